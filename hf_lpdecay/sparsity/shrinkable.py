"""What can be cut out of a model, so that what remains is a model of the same class with a smaller config.json."""

import copy
import re

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .units import Units


# What a config.json calls the width of the feed-forward.
_WIDTH_NAMES = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "hidden_dim")
_SIDES = ("encoder", "decoder")


def equally_wide(model: PreTrainedModel, pattern: str, found: list[Units]) -> dict[str, list[Units]]:
    """The units of layers whose width the config says with one number, by the side of the model that they are on.

    Args:
        model (`PreTrainedModel`): Holds them.
        pattern (`str`): `"neurons"` or `"heads"`.
        found (`list[Units]`): From [`find_units`].
    """
    sides: dict[str, list[Units]] = {}
    apart = pattern == "neurons" and hasattr(model.config, "encoder_ffn_dim")
    for units in found:
        side = next((side for side in _SIDES if apart and re.search(rf"(^|\.){side}\.", units.name)), "")
        sides.setdefault(side, []).append(units)
    return sides


def check_norms(model: PreTrainedModel, pattern: str, found: list[Units]) -> None:
    """Raise a `ValueError` where queries or keys are normalized over all heads, so that fewer heads change the others.

    Args:
        model (`PreTrainedModel`): The model.
        pattern (`str`): `"neurons"` or `"heads"`.
        found (`list[Units]`): From [`find_units`].
    """
    if pattern != "heads":
        return
    widths = {units.count * part.width for units in found for part in units.slices}
    for name, param in model.named_parameters():
        if (
            re.search(r"[qk]_(layer)?norm", name)
            and param.dim() == 1
            and param.numel() in widths
            and found[0].count > 1
        ):
            raise ValueError(f"{name} normalizes over all heads")


def resized(config: PreTrainedConfig, pattern: str, side: str, count: int, size: int) -> PreTrainedConfig:
    """A config with `size` of `count` neurons, or heads (key/value groups).

    Raises:
        ValueError: If the config does not say how many there are.
    """
    config = copy.deepcopy(config)
    if pattern == "neurons":
        names = [f"{side}_ffn_dim"] if side else [name for name in _WIDTH_NAMES if hasattr(config, name)]
        if not names:
            raise ValueError(f"{type(config).__name__} has no number for the feed-forward's width")
        setattr(config, names[0], size)
    else:
        if not hasattr(config, "num_key_value_heads") or config.is_encoder_decoder:
            raise ValueError(f"{type(config).__name__} cannot say how wide fewer heads are")
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        config.num_attention_heads = config.num_attention_heads // count * size
        config.num_key_value_heads = size
    return config


def smallest_valid(
    config: PreTrainedConfig, pattern: str, side: str, count: int, size: int
) -> tuple[PreTrainedConfig, int]:
    """The smallest config of at least `size` neurons or heads, and how many it has.

    Raises:
        ValueError: If there is none with fewer than `count`.
    """
    for enough in range(size, count):
        smaller = resized(config, pattern, side, count, enough)
        try:  # some configs want the hidden size to be a multiple of the heads
            smaller.validate()
        except StrictDataclassClassValidationError:
            continue
        return smaller, enough
    raise ValueError(f"no smaller number of {pattern} is a valid {type(config).__name__}")


def keep(units: Units, indices: Tensor, kept: dict[str, dict[int, Tensor]]) -> None:
    """Note which indices of which dimension stay, for each weight and for the biases of those that read."""
    for part in units.slices:
        own = (part.start + indices[:, None] * part.width + torch.arange(part.width, device=indices.device)).view(-1)
        names = [(part.name, part.dim)]
        if part is not units.slices[-1]:
            names.append((part.name.removesuffix("weight") + "bias", 0))
        for name, dim in names:
            before = kept.setdefault(name, {}).get(dim)
            kept[name][dim] = own if before is None else torch.cat([before, own])


def check_shapes(model: PreTrainedModel, config: PreTrainedConfig, kept: dict[str, dict[int, Tensor]]) -> None:
    """Check that a smaller config makes a model of the shapes that the cut leaves; nothing is allocated.

    Args:
        model (`PreTrainedModel`): The model.
        config (`PreTrainedConfig`): Of the smaller one.
        kept (`dict[str, dict[int, torch.Tensor]]`): Which indices of which dimension stay, by parameter name.

    Raises:
        ValueError: If it does not.
    """
    with torch.device("meta"):
        smaller = dict(type(model)._from_config(config).named_parameters())
    for name, param in model.named_parameters():
        shape = [len(kept.get(name, {}).get(dim, range(size))) for dim, size in enumerate(param.shape)]
        if name not in smaller or list(smaller[name].shape) != shape:
            wanted = tuple(smaller[name].shape) if name in smaller else "missing"
            raise ValueError(f"{name} would be {tuple(shape)}, and {type(config).__name__} then makes it {wanted}")


def check_shrinkable(model: PreTrainedModel, pattern: str, found: list[Units], sparsity: float) -> None:
    """Raise before the training where [`shrink`] could not cut out what the pattern makes zero.

    Args:
        model (`PreTrainedModel`): The model.
        pattern (`str`): `"neurons"` or `"heads"`.
        found (`list[Units]`): What becomes zero, from [`find_units`].
        sparsity (`float`): The fraction of them.

    Raises:
        ValueError: With the reason.
    """
    config, kept = model.config, {}
    try:
        check_norms(model, pattern, found)
        for side, group in equally_wide(model, pattern, found).items():
            count = group[0].count
            if any(units.count != count for units in group):
                raise ValueError(f"the layers have different numbers of {pattern}")
            config, size = smallest_valid(config, pattern, side, count, count - round(sparsity * count))
            for units in group:
                keep(units, torch.arange(size), kept)
        check_shapes(model, config, kept)
    except ValueError as error:
        raise ValueError(
            f"pattern={pattern!r}: shrink could not cut the zero {pattern} out of {type(model).__name__}: {error}. Take"
            " another pattern, or set require_shrinkable=False if zeros in this pattern are wanted for themselves."
        ) from error
