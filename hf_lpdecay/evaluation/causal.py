"""Checks that a model is a causal language model, and has a position for each token."""

import os

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel


def load_causal(path: str | os.PathLike, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a causal language model, if it was saved as one.

    Args:
        path (`str` or `os.PathLike`): Folder or hub id.
        dtype (`torch.dtype` or `"auto"`): Of the model.

    Raises:
        ValueError: If weights are missing, such as a classifier's output head: Transformers would draw them.
    """
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}, which would be"
            " random: it was saved as another model. Give a causal language model."
        )
    return model


def check_causal(model: nn.Module) -> None:
    """Raise a `ValueError` if a model of Transformers does not predict each next token of what it reads."""
    if isinstance(model, PreTrainedModel) and (not model.can_generate() or model.config.is_encoder_decoder):
        raise ValueError(
            f"{type(model).__name__} does not predict the next token of a text that it reads: give a causal language"
            " model, which AutoModelForCausalLM loads."
        )


def check_length(model: nn.Module, length: int, given: str) -> None:
    """Raise a `ValueError` if a model has fewer positions than it is to read tokens.

    Args:
        model (`nn.Module`): With a table of position embeddings; rotary ones, which are computed, have no end.
        length (`int`): How many tokens.
        given (`str`): The option that makes them so many, for the message.
    """
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None) or 0  # n_positions is another name of it
    if 0 < limit < length and not hasattr(config, "rope_parameters"):
        raise ValueError(
            f"{given} takes {length:,} positions, and the model has embeddings for {limit:,} (max_position_embeddings):"
            " take less."
        )
