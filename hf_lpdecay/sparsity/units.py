"""Neurons, heads and ranks: slices of weights that are pruned as a whole, to be cut out later."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from .sharding import whole


@dataclass(frozen=True, eq=False)
class UnitSlice:
    """The part of a weight that belongs to units: unit `u` has the indices `start + u * width`, and `width - 1` more.

    Args:
        name (`str`): The weight's name, as in `model.named_parameters()`.
        param (`torch.Tensor`): The weight, shape (n, m), or of experts (e, n, m).
        dim (`int`): The dimension of the matrix along which the units lie.
        start (`int`): Where the first unit begins.
        width (`int`): Indices per unit.
    """

    name: str
    param: Tensor
    dim: int
    start: int
    width: int

    def of(self, tensor: Tensor, count: int) -> Tensor:
        """A view of a tensor shaped like the weight, shape (units, ...); of experts a unit of each of them."""
        dim = tensor.dim() - 2 + self.dim
        return tensor.narrow(dim, self.start, count * self.width).movedim(dim, 0).unflatten(0, (count, -1))

    def along(self, values: Tensor, count: int) -> Tensor:
        """The units' part of what there is for each index of `dim`: shape (count, width), or (e, count, width)."""
        return values.narrow(-1, self.start, count * self.width).unflatten(-1, (count, self.width))


@dataclass(frozen=True, eq=False)
class Units:
    """The neurons of one feed-forward, the heads (key/value groups) of one attention, or the ranks of one adapter.

    Experts that share 3-D parameters have their neurons in one object. Each expert ranks its own.

    Args:
        name (`str`): Name of the block, and which of its weights: for messages and reports.
        count (`int`): How many units there are, or each expert has.
        slices (`tuple[UnitSlice]`): What they consist of. The slices of a weight cover it.
    """

    name: str
    count: int
    slices: tuple[UnitSlice, ...]

    @property
    def params(self) -> list[Tensor]:
        """The weights, each once."""
        return list({id(part.param): part.param for part in self.slices}.values())

    @property
    def experts(self) -> int | None:
        """How many experts there are; `None` where the weights are matrices."""
        shape = self.slices[0].param.shape
        return shape[0] if len(shape) == 3 else None

    def score(self, score: Callable[[Tensor], Tensor]) -> Tensor:
        """Root mean square of the scores of each unit's weights.

        Args:
            score (`Callable`): Returns the scores of a weight's entries, shaped like the weight.

        Returns:
            `torch.Tensor`: Shape (count,), or (experts, count).
        """
        total, numel = 0.0, 0
        for param in self.params:
            parts = [part for part in self.slices if part.param is param]
            along = whole(score(param).square_().sum(-1 - parts[0].dim))
            for part in parts:
                total = total + part.along(along, self.count).sum(-1)
                numel += part.width * param.shape[-1 - part.dim]
        return (total / numel).sqrt_()

    def live(self) -> Tensor:
        """Which units write something to the residual stream: bool, shape (count,), or (experts, count)."""
        writer = self.slices[-1]
        return writer.along((writer.param != 0).any(-1 - writer.dim), self.count).any(-1)

    def spread(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Give every weight the value of each entry's unit.

        Args:
            values (`torch.Tensor`): One per unit, shape (count,), or (experts, count).

        Returns:
            `Iterator[tuple[torch.Tensor, torch.Tensor]]`: A weight, and a tensor that broadcasts over it.
        """
        for param in self.params:
            parts = [part for part in self.slices if part.param is param]
            along = values.new_empty(*values.shape[:-1], param.shape[parts[0].dim - 2])
            for part in parts:
                part.along(along, self.count)[:] = values[..., None]
            yield param, along.unsqueeze(-1 - parts[0].dim)


def check_units(units: list[Units], selected: dict[str, Tensor], sparsity: float) -> list[Units]:
    """Keep the units whose weights are selected.

    Args:
        units (`list[Units]`): From [`find_units`].
        selected (`dict[str, torch.Tensor]`): Weights by name.
        sparsity (`float`): The fraction of the units that shall be zero.

    Raises:
        ValueError: If only some of a unit's weights are selected, or if the sparsity leaves none or all of the units.
    """
    kept = []
    for unit in units:
        left_out = [part.name for part in unit.slices if part.name not in selected]
        if len(left_out) == len(unit.slices):
            continue
        if left_out:
            raise ValueError(
                f"{unit.name} need all of {', '.join(part.name for part in unit.slices)}, but"
                f" {', '.join(left_out)} is not selected: widen target_modules, or leave out all of them with"
                " exclude_modules."
            )
        pruned = round(sparsity * unit.count)
        if not 0 < pruned < unit.count:
            raise ValueError(
                f"target_sparsity={sparsity} of the {unit.count} {unit.name} would be {pruned} of them: choose a target"
                f" between {1 / unit.count:.3g} and {1 - 1 / unit.count:.3g}."
                if unit.count > 1
                else f"{unit.name}: there is only one, which cannot be left out. Take another pattern."
            )
        kept.append(unit)
    if not kept:
        raise ValueError(
            f"None of the selected weights, such as {next(iter(selected))}, belongs to a unit of this pattern: widen"
            " target_modules."
        )
    return kept
