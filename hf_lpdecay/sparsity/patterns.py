"""Patterns of zeros: one small class each, one interface."""

import re
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Unstructured:
    """Every weight for itself."""

    # What the optimizer must know to tell who is small, if that is not the weight alone.
    spec: str | None = None

    @property
    def swap_group(self) -> int:
        """Within how many consecutive weights of a row two may swap their places in the mask; 1 for the whole row."""
        return 1

    def count(self, sparsity: float, numel: int) -> int:
        """How many of `numel` weights are zero at a sparsity: whole groups only."""
        return round(sparsity * numel)

    def rows(self, dim: int) -> int:
        """How many rows of a weight must be seen together to tell who is small."""
        return 1

    def check_all(self, params: dict[str, Tensor], dims: dict[str, int]) -> None:
        """Raise a `ValueError` that names the first weight which cannot be cut into the pattern's groups.

        Args:
            params (`dict[str, torch.Tensor]`): The weights by name.
            dims (`dict[str, int]`): For each weight the dimension of its input features, 1 if it is left out; of
                experts, that in each one's matrix.
        """
        for name, param in params.items():
            self.check(name, param, dims.get(name, 1))

    def check(self, name: str, param: Tensor, dim: int) -> None:
        """Raise a `ValueError` if a weight cannot be cut into the pattern's groups.

        Args:
            name (`str`): The weight's name, for the message.
            param (`torch.Tensor`): The weight, a matrix or one for each expert.
            dim (`int`): Its dimension of the input features.
        """


@dataclass(frozen=True)
class SemiStructured(Unstructured):
    """At least `keep` of any `group` consecutive weights along the input features survive, 2 of 4 for example."""

    keep: int = 2
    group: int = 4

    @property
    def sparsity(self) -> float:
        """The sparsity that the pattern leads to."""
        return 1.0 - self.keep / self.group

    @property
    def swap_group(self) -> int:
        return self.group

    def rows(self, dim: int) -> int:
        return self.group if dim == 0 else 1

    def check(self, name: str, param: Tensor, dim: int) -> None:
        if param.shape[-2:][dim] % self.group:
            raise ValueError(
                f"pattern={self.spec!r}: {name} has {param.shape[-2:][dim]} input features, not a multiple of"
                f" {self.group}. Leave it out with exclude_modules, or take another pattern."
            )


@dataclass(frozen=True)
class Block(Unstructured):
    """Tiles of `height` output and `width` input features are pruned as a whole."""

    height: int = 16
    width: int = 16

    def count(self, sparsity: float, numel: int) -> int:
        tile = self.height * self.width
        return round(sparsity * (numel // tile)) * tile

    def rows(self, dim: int) -> int:
        return self.height if dim == 1 else self.width

    def check(self, name: str, param: Tensor, dim: int) -> None:
        outputs, inputs = param.shape[-2:][1 - dim], param.shape[-2:][dim]
        if outputs % self.height or inputs % self.width:
            raise ValueError(
                f"pattern={self.spec!r}: {name} has {outputs} output and {inputs} input features, which such tiles do"
                " not fill. Leave it out with exclude_modules, or take another size."
            )


@dataclass(frozen=True)
class Structured(Unstructured):
    """Neurons, heads or ranks are pruned as a whole, see [`~.units.find_units`]."""

    units: str = "neurons"


def parse_pattern(spec: str) -> Unstructured:
    """Turn the `pattern` of an [`~hf_lpdecay.LpDecayConfig`] into an object.

    Args:
        spec (`str`): `"unstructured"`, `"n:m"` such as `"2:4"`, `"block:RxC"` such as `"block:16x16"`, `"neurons"`,
            `"heads"` or `"rank"`.

    Raises:
        ValueError: If it is none of these, or its numbers make no sense.
    """
    if spec == "unstructured":
        return Unstructured()
    if spec in ("neurons", "heads", "rank"):
        return Structured(units=spec)
    if match := re.fullmatch(r"(\d+):(\d+)", str(spec)):
        keep, group = map(int, match.groups())
        if 0 < keep < group <= 64:
            return SemiStructured(spec, keep, group)
    elif match := re.fullmatch(r"block:(\d+)x(\d+)", str(spec)):
        height, width = map(int, match.groups())
        if height > 0 and width > 0:
            return Block(spec, height, width)
    raise ValueError(
        f"Invalid pattern: {spec!r} - should be 'unstructured', 'n:m' with 0 < n < m <= 64 such as '2:4',"
        " 'block:RxC' such as 'block:16x16', 'neurons', 'heads' or 'rank'."
    )
