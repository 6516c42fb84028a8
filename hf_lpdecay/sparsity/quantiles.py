"""Order statistics of large tensors from histograms: no sort, no index tensor."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


# Non-negative float32 numbers are ordered like their bits, so the upper 16 bits are a histogram bin: 2**15 bins (the
# sign bit is zero), each 2**-7 wide relative to its value. The lower 16 bits tell apart what shares a bin.
_HIGH_BINS = 1 << 15
_LOW_BINS = 1 << 16


def histogram(r: Tensor) -> Tensor:
    """Count how many entries of `r` share their sign, exponent and leading 7 bits of mantissa.

    Args:
        r (`torch.Tensor`): Finite numbers ``>= 0``, any shape; ranked as float32.

    Returns:
        `torch.Tensor`: int64 counts, shape (32768,), in ascending order of value.
    """
    return torch.bincount(_bits(r) >> 16, minlength=_HIGH_BINS)


def lower_edges(counts: Tensor, ks: list[int]) -> list[float]:
    """For each histogram the largest bin edge with fewer than `k` entries below it; waits for the device once.

    Args:
        counts (`torch.Tensor`): From [`histogram`], or sums of several, shape (n, 32768).
        ks (`list[int]`): Ranks, n of them, each between 1 and its histogram's number of entries.

    Returns:
        `list[float]`: Each at most the exact k-th smallest entry, and less than 2**-7 below it, relatively.
    """
    bins = (counts.cumsum(1) < torch.tensor(ks, device=counts.device)[:, None]).sum(1)
    return (bins << 16).to(torch.int32).view(torch.float32).tolist()


def kth_smallest(
    sizes: Callable[[], Iterable[Tensor]], summed: Callable[[Tensor], Tensor], k: int
) -> tuple[float, int]:
    """The exact k-th smallest entry of several tensors together, in two passes over them.

    Args:
        sizes (`Callable`): Returns an iterable over the tensors (finite, ``>= 0``), the same at every call.
        summed (`Callable`): Sums counts over all processes that hold pieces; the identity if one holds all.
        k (`int`): Rank, between 1 and the number of entries.

    Returns:
        `tuple[float, int]`: The value, and how many entries are strictly smaller.
    """
    counts = summed(sum(histogram(r) for r in sizes()))
    high = _bin_of(counts, k)
    below = int(counts[:high].sum())
    low_counts = torch.zeros(_LOW_BINS, dtype=torch.int64, device=counts.device)
    for r in sizes():
        bits = _bits(r)
        low_counts += torch.bincount(bits[(bits >> 16) == high] & 0xFFFF, minlength=_LOW_BINS)
    low_counts = summed(low_counts)
    low = _bin_of(low_counts, k - below)
    return _value((high << 16) | low), below + int(low_counts[:low].sum())


def _bits(r: Tensor) -> Tensor:
    return r.to(torch.float32).contiguous().view(torch.int32).view(-1)


def _bin_of(counts: Tensor, k: int) -> int:
    return int((counts.cumsum(0) < k).sum())


def _value(bits: int) -> float:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()
