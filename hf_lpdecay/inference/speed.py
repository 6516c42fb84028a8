"""Whether a sparse layer is faster than the dense one, measured on this machine."""

import copy
import functools
import math
import time
from collections.abc import Hashable
from typing import TypeVar

import torch
from torch import Tensor, nn

from .encoding import MAX_COLUMNS, concatenate
from .kernels import kernel_for
from .sparse_linear import SparseLinear


# Below it a mask and the values take three quarters of the dense weight, and no shape was faster.
MIN_SPARSITY = 0.3
# From there on columns may be faster than a bit mask, which has to be read through.
COLUMNS_FROM = 0.75
# A layer is replaced if it takes at most this share of the dense one's time: more than two measurements differ by.
_MARGIN = 0.95
# Columns take more memory than a mask with less than 94 % zeros: they have to be faster by as much.
_COLUMNS_MARGIN = 0.9
_ROUNDS = 12
# Rows of x that are timed: one token at a time, and eight.
_ROWS = (1, 8)
# More than the caches of most processors hold for a few cores.
_CACHE_BYTES = 64 << 20
# Copies of a layer that take turns: of a tiny one not enough to fill the caches, which would take seconds.
_MOST_COPIES = 100

_Name = TypeVar("_Name", bound=Hashable)


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
    # One measurement for all layers of a shape within 5 %; with the fewest zeros of these, which is the slowest.
    return _measured(*weight.shape, weight.dtype, math.floor(sparsity * 20 + 1e-6) / 20, torch.get_num_threads())


@functools.cache
def _measured(rows: int, cols: int, dtype: torch.dtype, sparsity: float, threads: int) -> bool | None:
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(min(rows, 128), cols, generator=generator).to(dtype)  # all rows at random would take seconds
    part[torch.rand(part.shape, generator=generator) < sparsity] = 0.0
    dense = part.repeat(-(-rows // len(part)), 1)[:rows]
    candidates: dict[bool | None, nn.Module] = {None: nn.Linear(cols, rows, bias=False, device="meta")}
    candidates[None].weight = nn.Parameter(dense, requires_grad=False)
    candidates[False] = SparseLinear.from_dense(dense)
    if sparsity >= COLUMNS_FROM and cols <= MAX_COLUMNS:
        candidates[True] = SparseLinear.from_dense(dense, columns=True)
    seconds: dict[bool | None, list[float]] = {key: [] for key in candidates}
    for n in _ROWS:
        x = torch.randn(n, cols, generator=generator).to(dtype)
        for key, each in time_in_turn({key: (layer, x) for key, layer in candidates.items()}, _ROUNDS).items():
            seconds[key].append(min(each))  # the call that no other program disturbed
    return fastest(seconds)


def fastest(seconds: dict[bool | None, list[float]]) -> bool | None:
    """The encoding to take, by the seconds that each takes for some numbers of rows; `None` is the dense layer."""
    faster = {
        key: each[0] / _COLUMNS_MARGIN if key else each[0]
        for key, each in seconds.items()
        if key is not None and all(own <= _MARGIN * dense for own, dense in zip(each, seconds[None]))
    }
    return min(faster, key=faster.__getitem__, default=None)


@torch.inference_mode()
def time_in_turn(calls: dict[_Name, tuple[nn.Module, Tensor]], rounds: int) -> dict[_Name, list[float]]:
    """Seconds of each layer in interleaved rounds, after one that does not count.

    Of small layers copies take turns too (at most 100), so that each weight is out of every cache when its turn comes,
    as in a whole model, while the code is in them.

    Args:
        calls (`dict[Any, tuple[nn.Module, torch.Tensor]]`): Layers and what each is given.
        rounds (`int`): How often each is timed at least.
    """
    nbytes = sum(tensor.nbytes for layer, _ in calls.values() for tensor in (*layer.parameters(), *layer.buffers()))
    turns = [calls]
    for _ in range(min(_MOST_COPIES, _CACHE_BYTES // max(1, nbytes))):
        turns.append({name: (_copy(layer), x) for name, (layer, x) in calls.items()})
    seconds: dict[_Name, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for turn in turns:
            for name, (layer, x) in turn.items():
                started = time.perf_counter()
                layer(x)
                if number:
                    seconds[name].append(time.perf_counter() - started)
    return seconds


def _copy(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, SparseLinear):
        return copy.deepcopy(layer)
    packed = layer.packed  # a deep copy would not be in large pages
    packed = packed._replace(positions=concatenate([packed.positions]), values=concatenate([packed.values]))
    return SparseLinear(packed, layer.bias, layer.transposed)
