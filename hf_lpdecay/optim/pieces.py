"""Tensors as a step takes them: the shard that is here, in pieces whose scratch is small."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor
else:  # nothing is one
    DTensor = ()

# Elements that are updated at a time, whatever the size of the model: the scratch stays at a few MB on a CPU, whose
# cache it should fit, and below 64 MB elsewhere.
PIECE = 1 << 18
PIECE_ELSEWHERE = 1 << 22


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def factors_of(plan: dict[str, Any], weight: Tensor) -> tuple[tuple[Tensor, Tensor] | None, bool]:
    """What a parameter's plan says of its sizes.

    Args:
        plan (`dict[str, Any]`): With `lp_row` and `lp_col` (factors), `lp_size` (sizes of units), or none of them.
        weight (`torch.Tensor`): The part of the parameter that is here.

    Returns:
        `tuple`: Factors of the rows, shape (rows, 1), and of the columns, or `None`; whether they are the sizes. Those
        of a 3-D weight have its first dimension in front.
    """
    if "lp_size" in plan:
        size = local(plan["lp_size"])
        ones = size.new_ones(*weight.shape[:-1], 1)
        return ((size, ones[..., :1, :]) if size.shape[-2] == weight.shape[-2] else (ones, size)), True
    return ((local(plan["lp_row"]), local(plan["lp_col"])) if "lp_row" in plan else None), False


def matrices_of(
    tensors: tuple[Tensor, ...], factors: tuple[Tensor, Tensor] | None
) -> list[tuple[tuple[Tensor, ...], tuple[Tensor, Tensor] | None, int]]:
    """Split 3-D weights that have factors, those of experts, into their matrices.

    Args:
        tensors (`tuple[torch.Tensor, ...]`): What is split, all of one shape.
        factors (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Importance of rows and columns.

    Returns:
        `list[tuple]`: The matrices, views of the tensors, their factors, and the position of their first element; one
        entry with everything if there is nothing to split.
    """
    if factors is None or tensors[0].dim() != 3:
        return [(tensors, factors, 0)]
    size = tensors[0].shape[1] * tensors[0].shape[2]
    rows, columns = (factor.expand(len(tensors[0]), -1, -1) for factor in factors)
    return [(tuple(tensor[i] for tensor in tensors), (rows[i], columns[i]), i * size) for i in range(len(tensors[0]))]


def pieces_of(
    tensors: tuple[Tensor, ...],
    factors: tuple[Tensor, Tensor] | None = None,
    unit: int = 1,
    pattern: str | None = None,
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor | None, Tensor | None], int]]:
    """Split equally shaped tensors into pieces of few elements.

    Args:
        tensors (`tuple[torch.Tensor, ...]`): What is split, all of one shape.
        factors (`tuple[torch.Tensor, torch.Tensor]`, *optional*): Importance of rows and columns; pieces are then
            whole rows, which in a flat tensor are its elements.
        unit (`int`, *optional*, defaults to 1): How many rows must stay together.
        pattern (`str`, *optional*): If given, pieces are whole rows as well.

    Yields:
        `tuple`: The pieces, views of the tensors; their part of the factors, or two `None`; and the position of their
            first element.
    """
    shape, piece = tensors[0].shape, PIECE if tensors[0].device.type == "cpu" else PIECE_ELSEWHERE
    if factors is None and pattern is None and all(tensor.is_contiguous() for tensor in tensors):
        for offset, pieces in enumerate(zip(*(tensor.view(-1).split(piece) for tensor in tensors))):
            yield pieces, (None, None), offset * piece
    elif len(shape) == 3:
        size = shape[1] * shape[2]
        for i in range(shape[0]):
            own = None if factors is None else (factors[0][i], factors[1][i])
            for pieces, split, offset in pieces_of(tuple(tensor[i] for tensor in tensors), own, unit, pattern):
                yield pieces, split, i * size + offset
    elif len(shape) < 2 and factors is None:
        yield tensors, (None, None), 0
    else:
        width = tensors[0].numel() // max(1, shape[0])
        rows = max(1, piece // max(1, width) // unit) * unit
        for start in range(0, shape[0], rows):
            here = slice(start, start + rows)
            row, col = (None, None) if factors is None else (factors[0][here], factors[1])
            yield tuple(tensor[here] for tensor in tensors), (row, col), start * width
