"""Weights that `save_pretrained` writes under other names than the model has them, loaded by `load_state_dict` too.

Since Transformers 5, a mixture of experts is saved in its original layout, with a matrix for each expert, and
`from_pretrained` puts them together. A `Trainer` that resumes, or loads its best model, calls `load_state_dict` with
``strict=False``, which passes over them: the experts keep their values without an error.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig


def accept_saved_names(model: nn.Module) -> None:
    """Make the model's `load_state_dict` understand the names and the layout of `save_pretrained`, shard by shard too.

    Args:
        model (`nn.Module`): Others than a `PreTrainedModel` are left as they are.
    """
    if not isinstance(model, PreTrainedModel) or hasattr(model, "_held_back"):
        return
    if get_model_conversion_mapping(model, add_legacy=False):
        model._held_back = {}  # from one shard to the next: parts of a weight whose other parts are in another
        model.register_load_state_dict_pre_hook(_convert)


def _convert(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Put what the model has names for in place of what it has none for."""
    own = {prefix + name for name, _ in model.named_parameters()}
    others = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix) and name not in own}
    if own <= state_dict.keys() or not others:
        return
    others = {**model._held_back, **others}
    with torch.device("meta"):  # a model without weights takes them, as from_pretrained does it
        target = type(model)._from_config(model.config, dtype=model.dtype)
    config = LoadStateDictConfig(
        weight_mapping=get_model_conversion_mapping(model, add_legacy=False), device_map={"": "cpu"}
    )
    tensors = {name.removeprefix(prefix): tensor for name, tensor in others.items()}
    info, _ = convert_and_load_state_dict_in_model(target, tensors, config)
    model._held_back = others if info.mismatched_keys or info.conversion_errors else {}
    for name in others:
        if name.removeprefix(prefix) not in info.unexpected_keys:
            state_dict.pop(name, None)
    loaded = {name: tensor for name, tensor in target.state_dict().items() if not tensor.is_meta}
    state_dict.update({prefix + name: tensor for name, tensor in loaded.items()})
