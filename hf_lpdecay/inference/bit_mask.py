"""The kernel that [`triton_kernel`] launches: importing this file imports Triton."""

import triton
import triton.language as tl


@triton.jit
def multiply(
    x, positions, values, starts, bias, y, rows, cols: tl.constexpr, n, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """`ROWS` outputs of each of the `n` rows of `x`; the mask is decoded once for all of them.

    A value's place among the packed ones is the number of bits set before it in its row: a running sum.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    stride = (cols + 7) // 8
    place = tl.load(starts + row, mask=real, other=0)
    col = tl.arange(0, COLS)
    token = tl.arange(0, 8)
    sums = tl.zeros((8, ROWS), tl.float32)
    for first in range(0, cols, COLS):
        inside = first + col < cols
        address = positions + row[:, None].to(tl.int64) * stride + (first + col)[None, :] // 8
        byte = tl.load(address, mask=real[:, None] & inside[None, :], other=0)
        bit = (byte.to(tl.int32) >> (col % 8)[None, :]) & 1
        rank = tl.cumsum(bit, 1) - bit
        w = tl.load(values + place[:, None] + rank, mask=bit != 0, other=0.0).to(tl.float32)
        place += tl.sum(bit, 1)
        at = token[:, None] * cols + (first + col)[None, :]
        given = tl.load(x + at, mask=(token < n)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        sums += tl.sum(given[:, None, :] * w[None, :, :], 2)
    if bias is not None:
        sums += tl.load(bias + row, mask=real, other=0.0).to(tl.float32)[None, :]
    out = token[:, None] * rows + row[None, :]
    tl.store(y + out, sums.to(y.dtype.element_ty), mask=(token < n)[:, None] & real[None, :])
