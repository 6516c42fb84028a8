"""From a dense weight to positions and values, and back, on any device."""

import mmap
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from .kernels import PADDING, Weight, dense, kernel_for


# Entries that are looked at at a time, so that what lies beside the weight stays small.
_PART = 1 << 20
# A number of a column takes 16 bits.
MAX_COLUMNS = 1 << 16
# Bytes of a large page, in which tensors of this size and more are asked to lie.
_PAGE = 2 << 20
_INTEGERS = {2: torch.int16, 4: torch.int32}


def encode(weight: Tensor, columns: bool = False) -> Weight:
    """Pack a weight. Zero means that all bits are: -0.0 is a value, as in an archive of `pack`.

    Args:
        weight (`torch.Tensor`): Shape (rows, cols), float32, bfloat16 or float16.
        columns (`bool`, *optional*, defaults to `False`): Keep the column of each value instead of a bit mask; at most
            65,536 columns.

    Returns:
        `Weight`: On the same device.
    """
    return encode_parts(weight.detach().split(rows_of_part(weight.shape[1])), weight.shape[1], columns, weight)


def rows_of_part(cols: int) -> int:
    """How many rows to look at at a time."""
    return max(1, _PART // max(1, cols))


def encode_parts(parts: Iterable[Tensor], cols: int, columns: bool, like: Tensor) -> Weight:
    """As [`encode`], from some rows after the other.

    Args:
        parts (`Iterable[torch.Tensor]`): Shape (some rows, cols).
        cols, columns: See [`Weight`].
        like (`torch.Tensor`): Of the values' type, on the device.
    """
    powers = (2 ** torch.arange(8, device=like.device)).to(torch.uint8)
    positions, values, counts = [], [], []
    for part in parts:
        part = part.contiguous()
        mask = part.view(_INTEGERS[part.element_size()]) != 0
        values.append(part[mask])
        counts.append(mask.sum(1))
        if columns:
            positions.append(mask.nonzero()[:, 1].to(torch.int32).to(torch.int16).view(torch.uint8))
        elif like.device.type == "cpu":  # many times as fast as the next lines
            positions.append(torch.from_numpy(np.packbits(mask.numpy(), 1, bitorder="little")).flatten())
        else:
            bits = torch.nn.functional.pad(mask, (0, -cols % 8)).view(len(part), -1, 8)
            positions.append((bits * powers).sum(-1, dtype=torch.uint8).flatten())
    return join(positions, values, torch.cat(counts) if counts else None, cols, columns, like)


def join(
    positions: list[Tensor], values: list[Tensor], counts: Tensor | None, cols: int, columns: bool, like: Tensor
) -> Weight:
    """A weight from the parts of its positions and values.

    Args:
        positions, values (`list[torch.Tensor]`): One after the other.
        counts (`torch.Tensor`, *optional*): Values in each row.
        cols, columns: See [`Weight`].
        like (`torch.Tensor`): Of the values' type, on the device.
    """
    starts = like.new_zeros(1 if counts is None else len(counts) + 1, dtype=torch.int64)
    if counts is not None:
        torch.cumsum(counts, 0, out=starts[1:])
    positions.append(like.new_zeros(PADDING, dtype=torch.uint8))
    values.append(like.new_zeros(PADDING // like.element_size()))
    joined = concatenate(values)
    values.clear()
    return Weight(concatenate(positions), joined, starts, cols, columns)


def concatenate(parts: list[Tensor]) -> Tensor:
    """As `torch.cat`, into large pages where the system has them: the processor finds its way through these faster."""
    like = parts[0]
    numel = sum(part.numel() for part in parts)
    nbytes = numel * like.itemsize
    if like.device.type != "cpu" or nbytes < _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.cat(parts)
    # Private, as shared memory has no large pages; and longer, so that it can begin at the beginning of one.
    memory = mmap.mmap(-1, nbytes + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _PAGE
    try:
        memory.madvise(mmap.MADV_HUGEPAGE, offset, nbytes // _PAGE * _PAGE)
    except OSError:  # a system without them
        return torch.cat(parts)
    return torch.cat(parts, out=torch.frombuffer(memory, dtype=like.dtype, count=numel, offset=offset))


def decode(weight: Weight) -> Tensor:
    """The dense weight, shape (rows, cols), bit for bit."""
    if weight.values.device.type == "cpu":
        kernel = kernel_for(weight.values.dtype)
        if not isinstance(kernel, str):
            return dense(kernel, weight)
    return decode_slowly(weight)


def decode_slowly(weight: Weight) -> Tensor:
    """As [`decode`], in torch operations."""
    rows, cols = weight.rows, weight.cols
    out = weight.values.new_zeros(rows, cols)
    values = weight.values[: weight.count]
    if weight.columns:
        columns = weight.positions[:-PADDING].view(torch.int16).to(torch.int64) & 0xFFFF
        counts = weight.starts.diff()
        out[torch.repeat_interleave(torch.arange(rows, device=out.device), counts), columns] = values
        return out
    stride = -(-cols // 8)
    shifts = torch.arange(8, device=out.device, dtype=torch.uint8)
    bits = weight.positions[:-PADDING].view(rows, stride, 1) >> shifts & 1
    out[bits.view(rows, 8 * stride)[:, :cols].bool()] = values
    return out


def pad_rows(mask: Tensor, values: Tensor, rows: int, cols: int) -> Weight:
    """A weight from one mask for all its entries, in which rows need not begin at a byte.

    Args:
        mask (`torch.Tensor`): uint8, lowest bit first, and 64 bytes of padding.
        values (`torch.Tensor`): With 64 bytes of padding.
        rows, cols (`int`): The weight's shape.
    """
    stride = -(-cols // 8)
    if cols % 8:
        bits = np.unpackbits(mask[:-PADDING].numpy(), bitorder="little")[: rows * cols].reshape(rows, cols)
        mask = torch.cat([torch.from_numpy(np.packbits(bits, 1, bitorder="little")).flatten(), mask[-PADDING:]])
    counts = np.bitwise_count(mask[: rows * stride].numpy().reshape(rows, stride)).sum(1, dtype=np.int64)
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(torch.from_numpy(counts), 0, out=starts[1:])
    return Weight(mask, values, starts, cols, False)


def to_columns(weight: Weight) -> Weight:
    """The same weight, with columns in place of the bit mask, on a CPU."""
    stride, step = -(-weight.cols // 8), max(1, _PART // max(1, weight.cols))
    parts = []
    for part in weight.positions[:-PADDING].view(weight.rows, stride).split(step):
        bits = np.unpackbits(part.numpy(), 1, count=weight.cols, bitorder="little")
        parts.append(torch.from_numpy(bits.nonzero()[1].astype(np.uint16).view(np.uint8)))
    parts.append(weight.positions[-PADDING:])
    return weight._replace(positions=concatenate(parts), columns=True)
