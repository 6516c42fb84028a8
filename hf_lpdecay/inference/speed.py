"""Whether a sparse layer is faster than the dense one, measured on this machine."""

import functools
import statistics
import time

import torch
from torch import Tensor, nn

from .encoding import MAX_COLUMNS
from .kernels import kernel_for
from .sparse_linear import SparseLinear


# Below it a mask and the values take three quarters of the dense weight, and no shape was faster.
MIN_SPARSITY = 0.3
# From there on columns may be faster than a bit mask, which has to be read through.
COLUMNS_FROM = 0.85
_ROUNDS = 7
# Rows of x that are timed: one token at a time, and eight.
_ROWS = (1, 8)


def choose_encoding(weight: Tensor, sparsity: float) -> bool | None:
    """How a layer is faster than dense: with a bit mask (`False`), with columns (`True`), or not at all (`None`).

    Args:
        weight (`torch.Tensor`): Shape (out, in), on any device.
        sparsity (`float`): Share of its entries that are zero.
    """
    if sparsity < MIN_SPARSITY or weight.numel() == 0:
        return None
    if weight.device.type != "cpu":
        return False
    if isinstance(kernel_for(weight.dtype), str):
        return None
    # Layers of one shape differ little in their zeros, and not in what is faster: 2 % is the grain.
    return _measured(*weight.shape, weight.dtype, round(sparsity * 50) / 50, torch.get_num_threads())


@functools.cache
def _measured(rows: int, cols: int, dtype: torch.dtype, sparsity: float, threads: int) -> bool | None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(rows, cols, generator=generator).to(dtype)
    dense[torch.rand(rows, cols, generator=generator) < sparsity] = 0.0
    candidates: dict[bool | None, nn.Module] = {None: nn.Linear(cols, rows, bias=False, device="meta")}
    candidates[None].weight = nn.Parameter(dense, requires_grad=False)
    candidates[False] = SparseLinear.from_dense(dense)
    if sparsity >= COLUMNS_FROM and cols <= MAX_COLUMNS:
        candidates[True] = SparseLinear.from_dense(dense, columns=True)
    timed = [_time(candidates, n, dtype) for n in _ROWS]
    seconds = {key: [each[key] for each in timed] for key in candidates}
    return min(
        (key for key in candidates if key is None or all(a <= b for a, b in zip(seconds[key], seconds[None]))),
        key=lambda key: seconds[key][0],
    )


@torch.no_grad()
def _time(candidates: dict[bool | None, nn.Module], n: int, dtype: torch.dtype) -> dict[bool | None, float]:
    """Median seconds of each, in interleaved rounds with the weight out of the nearest cache, as in a whole model."""
    x = torch.randn(n, candidates[None].in_features).to(dtype)
    other = torch.empty(4 << 20, dtype=torch.uint8)
    seconds: dict[bool | None, list[float]] = {name: [] for name in candidates}
    for _ in range(_ROUNDS):
        for name, module in candidates.items():
            other.add_(1)
            started = time.perf_counter()
            module(x)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}
