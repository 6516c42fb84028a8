"""The CPU's kernels for sparse linear layers: compiles and calls `native/sparse_linear.cpp`."""

import ctypes
import functools
import os
import struct
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..native import load_library


logger = logging.get_logger(__name__)

_FOLDER = Path(__file__).parent / "native"
_SOURCES = (_FOLDER / "sparse_linear.cpp", *sorted(_FOLDER.glob("*.h")))
_TYPES = {torch.float32: ("float", 0), torch.bfloat16: ("bf16", 1), torch.float16: ("f16", 2)}
_LAYER = struct.Struct("=7q")  # common.h's Layer
# Instruction sets that can be asked for, and what the compiler is told. "native": the best that this processor has.
INSTRUCTION_SETS = {
    "native": ((), ("-march=native", "-mcpu=native")),
    "avx2": ((), ("-march=x86-64-v3",)),
    "plain": (("ISA_PLAIN",), ("-march=native", "-mcpu=native")),
}
# Bytes that may be read past the end of positions and values.
PADDING = 64
# Of the weight that is decoded at a time when there are many rows; smaller parts made torch's product slower.
_TILE_BYTES = 32 << 20


class Weight(NamedTuple):
    """A weight of shape (rows, cols) with zeros, on any device.

    Args:
        positions (`torch.Tensor`): uint8. Bits: one for each entry, rows padded to bytes, lowest bit first, shape
            (rows * ceil(cols / 8) + 64,). Columns: an uint16 for each value.
        values (`torch.Tensor`): Those that are not zero, row by row, and 64 bytes of padding.
        starts (`torch.Tensor`): int64, shape (rows + 1,): where a row's values begin.
        cols (`int`): Number of columns.
        columns (`bool`): What `positions` are.
    """

    positions: Tensor
    values: Tensor
    starts: Tensor
    cols: int
    columns: bool

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    @property
    def count(self) -> int:
        """Number of values."""
        return int(self.starts[-1])


class Kernel:
    """The compiled functions for one type of values.

    Args:
        dtype (`torch.dtype`): Of the values: float32, bfloat16 or float16.
        instructions (`str`): Of [`INSTRUCTION_SETS`].

    Raises:
        RuntimeError: If there is no C++ compiler, or it fails.
    """

    def __init__(self, dtype: torch.dtype, instructions: str):
        name, number = _TYPES[dtype]
        macros, machines = INSTRUCTION_SETS[instructions]
        defines = {"VALUE": name, "VALUE_IS": number, **dict.fromkeys(macros, 1)}
        library = load_library("sparse layers", _SOURCES, defines, standard="c++17", machines=machines)
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.multiply.argtypes = [ctypes.c_char_p, pointer, pointer, number, number, number, number, pointer]
        library.decode.argtypes = [ctypes.c_char_p, pointer, number, number, pointer]
        library.multiply.restype = library.decode.restype = None
        library.most_rows.argtypes, library.most_rows.restype = [number] * 2, number
        library.allow_amx.restype, library.instruction_set.restype = number, ctypes.c_char_p
        self._multiply, self._decode = library.multiply, library.decode
        self.dtype, self.amx = dtype, library.allow_amx()
        self.instruction_set = library.instruction_set().decode()
        self.most_rows = {act: library.most_rows(code, self.amx) or sys.maxsize for act, (_, code) in _TYPES.items()}

    def describe(self, weight: Weight, bias: Tensor | None, first: int = 0, last: int | None = None) -> bytes:
        """What the kernel takes: addresses and sizes of some rows. The tensors must outlive it."""
        rows = weight.rows if last is None else last - first
        positions = weight.positions.data_ptr() + (0 if weight.columns else first * -(-weight.cols // 8))
        starts = weight.starts.data_ptr() + 8 * first
        address = 0 if bias is None else bias.data_ptr()
        return _LAYER.pack(positions, weight.values.data_ptr(), starts, address, rows, weight.cols, weight.columns)

    def multiply(self, layer: bytes, x: Tensor, y: Tensor, rows: int) -> None:
        """`y = x W^T + bias`, in float32 inside.

        Args:
            layer (`bytes`): From [`Kernel.describe`]; its bias has the type of `x`.
            x, y (`torch.Tensor`): Contiguous, of one of the three types, `rows` rows. For more than `most_rows` says
                torch's product with the decoded weight is faster.
        """
        code = _TYPES[x.dtype][1]
        self._multiply(layer, x.data_ptr(), y.data_ptr(), rows, code, self.amx, torch.get_num_threads(), _parallel())

    def decode(self, layer: bytes, out: Tensor) -> None:
        """Write the dense rows of a layer; `out` is float32 or of the values' type."""
        as_float = out.dtype == torch.float32
        self._decode(layer, out.data_ptr(), as_float, torch.get_num_threads(), _parallel())


@functools.cache
def kernel_for(dtype: torch.dtype, instructions: str | None = None) -> Kernel | str:
    """The kernel for a type of values, or why there is none.

    Args:
        dtype (`torch.dtype`): float32, bfloat16 or float16.
        instructions (`str`, *optional*): Of [`INSTRUCTION_SETS`]. Defaults to the variable HF_LPDECAY_ISA, or
            `"native"`.
    """
    instructions = instructions or os.environ.get("HF_LPDECAY_ISA") or "native"
    if instructions not in INSTRUCTION_SETS:
        return f"Invalid HF_LPDECAY_ISA={instructions!r}: should be one of {', '.join(INSTRUCTION_SETS)}."
    try:
        return Kernel(dtype, instructions)
    except RuntimeError as error:
        return str(error)


def linear(kernel: Kernel, weight: Weight, bias: Tensor | None, x: Tensor, layer: bytes | None = None) -> Tensor:
    """`x W^T + bias` on a CPU.

    The packed weight itself is multiplied, which puts its values in their places in the caches. Where the kernel says
    that torch's dense product is faster, for many rows with AMX, the weight is decoded for it, 32 MB at a time.

    Args:
        kernel (`Kernel`): For the values' type.
        weight (`Weight`): On the CPU.
        bias (`torch.Tensor`, *optional*): Shape (rows of the weight,), of the type of `x`.
        x (`torch.Tensor`): Shape (..., cols).
        layer (`bytes`, *optional*): From `kernel.describe(weight, bias)`, if it is known already.

    Returns:
        `torch.Tensor`: Shape (..., rows of the weight), of the type of `x`.

    Raises:
        RuntimeError: If `x` has not `cols` features.
    """
    check_features(x, weight)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], weight.rows)
    n = x.numel() // weight.cols
    if n <= kernel.most_rows[x.dtype]:
        if n:
            kernel.multiply(layer or kernel.describe(weight, bias), x, y, n)
        return y
    flat, out = x.view(n, weight.cols), y.view(n, weight.rows)
    # In the type of `x` where that is the faster one: without instructions for bfloat16 torch takes ten times as long.
    low = x.dtype != torch.float32 and x.dtype == kernel.dtype and is_fast(x.dtype)
    inside = x.dtype if low else torch.float32
    flat = flat.to(inside)
    bias = None if bias is None else bias.to(inside)
    step = max(32, min(weight.rows, _TILE_BYTES // (weight.cols * inside.itemsize) // 32 * 32))
    tile = _scratch(step * weight.cols, inside).view(step, weight.cols)
    for first in range(0, weight.rows, step):
        last = min(first + step, weight.rows)
        kernel.decode(kernel.describe(weight, None, first, last), tile)
        out[:, first:last] = nn.functional.linear(
            flat, tile[: last - first], None if bias is None else bias[first:last]
        )
    return y


def check_features(x: Tensor, weight: Weight) -> None:
    """Raise what a dense layer raises if `x` has other features than the weight, which a kernel would read past."""
    if x.shape[-1] != weight.cols:
        given = f"{x.shape[:-1].numel()}x{x.shape[-1]}"
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({given} and {weight.cols}x{weight.rows})")


_kept = threading.local()


def _scratch(numel: int, dtype: torch.dtype) -> Tensor:
    """Memory for a tile, kept for the thread's next call: to get it anew takes as long as a product."""
    buffer = getattr(_kept, "buffer", None)
    if buffer is None or buffer.numel() < numel * dtype.itemsize:
        buffer = _kept.buffer = torch.empty(numel * dtype.itemsize, dtype=torch.uint8)
    return buffer[: numel * dtype.itemsize].view(dtype)


def dense(kernel: Kernel, weight: Weight) -> Tensor:
    """The weight as an ordinary tensor, on a CPU."""
    out = torch.empty(weight.rows, weight.cols, dtype=kernel.dtype)
    kernel.decode(kernel.describe(weight, None), out)
    return out


@functools.cache
def is_fast(dtype: torch.dtype) -> bool:
    """Whether torch's dense products of many rows are faster on this CPU in a type than in float32 (measured once)."""
    seconds = {}
    for each in (torch.float32, dtype):
        x, w = torch.ones(64, 512, dtype=each), torch.ones(512, 512, dtype=each)
        nn.functional.linear(x, w)
        started = time.perf_counter()
        nn.functional.linear(x, w)
        seconds[each] = time.perf_counter() - started
    return seconds[dtype] <= seconds[torch.float32]


@functools.cache
def _parallel() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch itself uses; 0 if it has another one.

    A second pool of threads would compete with torch's, which wait for the next operation without sleeping.
    """
    folder = Path(torch.__file__).parent / "lib"
    for path in (*folder.glob("libtorch_cpu.*"), *folder.glob("libgomp*"), *folder.glob("libiomp*")):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return 0
