"""Tensors as a step takes them: the shard that is here, in pieces whose scratch is small."""

from collections.abc import Iterator

import torch
from torch import Tensor


if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor
else:  # nothing is one
    DTensor = ()

# Elements that are updated at a time, whatever the size of the model: the scratch stays at a few MB on a CPU, whose cache
# it should fit, and below 64 MB elsewhere.
PIECE = 1 << 18
PIECE_ELSEWHERE = 1 << 22


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
            whole rows.
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
    elif len(shape) < 2:
        yield tensors, factors or (None, None), 0
    else:
        width = tensors[0].numel() // max(1, shape[0])
        rows = max(1, piece // max(1, width) // unit) * unit
        for start in range(0, shape[0], rows):
            here = slice(start, start + rows)
            row, col = (None, None) if factors is None else (factors[0][here], factors[1])
            yield tuple(tensor[here] for tensor in tensors), (row, col), start * width
