"""What can be cut out of a model, so that what remains is a model of the same class with a smaller config.json."""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .units import Units


@dataclass(frozen=True)
class Number:
    """A number of the config, and the units that there are so many of, or a multiple of it.

    Args:
        name (`str`): The field of the config; for heads `"num_key_value_heads"`.
        value (`int`): What it is.
        units (`list[Units]`): What it counts.
    """

    name: str
    value: int
    units: list[Units]

    def covering(self, counts: Iterable[int]) -> int:
        """The smallest value at which so many of each of the units have a place."""
        return max(-(-count * self.value // units.count) for units, count in zip(self.units, counts))


def numbers(model: PreTrainedModel, pattern: str, found: list[Units]) -> list[Number]:
    """Which numbers of the config say how many units there are.

    The number of neurons is looked up by trying: it is the one which, when it is doubled, makes exactly these weights
    twice as wide. Nothing is allocated.

    Args:
        model (`PreTrainedModel`): Holds them.
        pattern (`str`): `"neurons"` or `"heads"`.
        found (`list[Units]`): From [`find_units`].

    Raises:
        ValueError: If there is none.
    """
    if pattern == "heads":
        if any(units.count != found[0].count for units in found):
            raise ValueError("the layers have different numbers of heads")
        return [Number("num_key_value_heads", found[0].count, found)]
    config, left, numbers = model.config, list(found), []
    while left:
        shared = ""
        for name in _candidates(config, left[0].count):
            value = getattr(config, name) or left[0].count
            changed = _changed_shapes(model, name, 2 * value)
            units = [units for units in left if units.slices[0].name in changed]
            wanted = _doubled(model, units)
            if units and changed == wanted:
                break
            if units and all(changed.get(weight) == shape for weight, shape in wanted.items()):
                shared = f" alone: {name} is that of {next(iter(changed.keys() - wanted.keys()))} too"
        else:
            raise ValueError(f"{type(config).__name__} has no number for the width of {left[0].name}{shared}")
        numbers.append(Number(name, value, units))
        left = [units for units in left if units not in numbers[-1].units]
    return numbers


def _candidates(config: PreTrainedConfig, count: int) -> list[str]:
    """Fields that may say how many neurons there are: the likelier ones first."""
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    found = [name for name, value in fields.items() if type(value) is int and value > 0 and count % value == 0]
    found = sorted(found, key=lambda name: -fields[name])  # shared experts are several times as wide as others
    return found + [name for name, value in fields.items() if value is None]


def _shapes(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, list[int]]:
    """The shapes of the parameters of a model of this class that a config describes."""
    with torch.device("meta"):
        return {name: list(param.shape) for name, param in type(model)._from_config(config).named_parameters()}


def _changed_shapes(model: PreTrainedModel, name: str, value: int) -> dict[str, list[int]]:
    """The shapes that are others when a field of the config has another value; none where that is not valid."""
    config = copy.deepcopy(model.config)
    try:
        setattr(config, name, value)
        shapes = _shapes(model, config)
    except Exception:  # whatever a model says of a config that makes no sense
        return {}
    own = {name: list(param.shape) for name, param in model.named_parameters()}
    return {name: shape for name, shape in shapes.items() if own.get(name) != shape}


def _doubled(model: PreTrainedModel, found: list[Units]) -> dict[str, list[int]]:
    """The shapes of the weights of units, and of their biases, with twice as many units."""
    kept: dict[str, dict[int, Tensor]] = {}
    for units in found:
        keep(units, torch.arange(2 * units.count, device="meta"), kept)
    return {name: _cut_shape(param, kept[name]) for name, param in model.named_parameters() if name in kept}


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


def smallest_valid(config: PreTrainedConfig, number: Number, size: int) -> tuple[PreTrainedConfig, int]:
    """The smallest config whose number is at least `size`, and the number that it has.

    Raises:
        ValueError: If there is none below the present one, or if the config does not say how many heads there are.
    """
    for enough in range(size, number.value):
        smaller = copy.deepcopy(config)
        if number.name == "num_key_value_heads":
            _set_heads(smaller, number.value, enough)
        else:
            setattr(smaller, number.name, enough)
        try:  # some configs want the hidden size to be a multiple of the heads
            smaller.validate()
        except StrictDataclassClassValidationError:
            continue
        return smaller, enough
    what = "heads" if number.name == "num_key_value_heads" else number.name
    raise ValueError(f"no smaller number of {what} is a valid {type(config).__name__}")


def _set_heads(config: PreTrainedConfig, count: int, size: int) -> None:
    """Leave `size` of `count` heads (key/value groups)."""
    if not hasattr(config, "num_key_value_heads") or config.is_encoder_decoder:
        raise ValueError(f"{type(config).__name__} cannot say how wide fewer heads are")
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.num_attention_heads = config.num_attention_heads // count * size
    config.num_key_value_heads = size


def keep(units: Units, indices: Tensor, kept: dict[str, dict[int, Tensor]]) -> None:
    """Note which indices of which dimension stay, for each weight and for the biases of those that read.

    Args:
        units (`Units`): What the weights consist of.
        indices (`torch.Tensor`): The units that stay, shape (n,), or of experts (experts, n).
        kept (`dict[str, dict[int, torch.Tensor]]`): By parameter name and dimension; added to.
    """
    for part in units.slices:
        own = part.start + indices[..., None] * part.width + torch.arange(part.width, device=indices.device)
        first = part.param.dim() - 2  # an expert's matrix and bias have its number in front
        names = [(part.name, first + part.dim)]
        if part is not units.slices[-1]:
            names.append((f"{part.name}_bias" if units.experts else f"{part.name.removesuffix('weight')}bias", first))
        for name, dim in names:
            before = kept.setdefault(name, {}).get(dim)
            kept[name][dim] = own.flatten(-2) if before is None else torch.cat([before, own.flatten(-2)], -1)


def _cut_shape(param: Tensor, kept: dict[int, Tensor]) -> list[int]:
    """The shape of a parameter of which some indices stay."""
    return [kept[dim].shape[-1] if dim in kept else size for dim, size in enumerate(param.shape)]


def check_shapes(model: PreTrainedModel, config: PreTrainedConfig, kept: dict[str, dict[int, Tensor]]) -> None:
    """Check that a smaller config makes a model of the shapes that the cut leaves; nothing is allocated.

    Args:
        model (`PreTrainedModel`): The model.
        config (`PreTrainedConfig`): Of the smaller one.
        kept (`dict[str, dict[int, torch.Tensor]]`): Which indices of which dimension stay, by parameter name.

    Raises:
        ValueError: If it does not.
    """
    smaller = _shapes(model, config)
    for name, param in model.named_parameters():
        shape = _cut_shape(param, kept.get(name, {}))
        if smaller.get(name) != shape:
            wanted = tuple(smaller[name]) if name in smaller else "missing"
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
        for number in numbers(model, pattern, found):
            size = number.covering(units.count - round(sparsity * units.count) for units in number.units)
            config, size = smallest_valid(config, number, size)
            for units in number.units:
                keep(units, torch.arange(size * units.count // number.value), kept)
        check_shapes(model, config, kept)
    except ValueError as error:
        raise ValueError(
            f"pattern={pattern!r}: shrink could not cut the zero {pattern} out of {type(model).__name__}: {error}. Take"
            " another pattern, or set require_shrinkable=False if zeros in this pattern are wanted for themselves."
        ) from error
