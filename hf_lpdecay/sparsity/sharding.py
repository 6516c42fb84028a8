"""Parameters that several processes hold in pieces (FSDP2's DTensor): what is put together, what is summed over all.

Everything here does nothing for ordinary tensors.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold other pieces."""
    return isinstance(tensor, DTensor) and any(placement.is_shard() for placement in tensor.placements)


def whole(tensor: Tensor) -> Tensor:
    """The tensor as a whole, the same in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(vector: Tensor, param: Tensor) -> Tensor:
    """Put what broadcasts over a parameter to where its pieces are.

    Args:
        vector (`torch.Tensor`): Shape (n, 1) or (1, m), the same in every process.
        param (`torch.Tensor`): Shape (n, m).
    """
    if not isinstance(param, DTensor):
        return vector
    placements = [
        Replicate() if placement.is_shard() and vector.shape[placement.dim] == 1 else placement
        for placement in param.placements
    ]
    return distribute_tensor(vector, param.device_mesh, placements, src_data_rank=None)


def summed(counts: Tensor, params: list[Tensor]) -> Tensor:
    """Sum what each process has counted in its pieces of `params`: one small all-reduce per mesh dimension."""
    if isinstance(params[0], DTensor):
        for group in _groups(params[0]):
            torch.distributed.all_reduce(counts, group=group)
    return counts


def summed_rows(counts: Tensor, params: list[Tensor]) -> Tensor:
    """Sum what each process has counted in its pieces of several parameters, row by row of `counts`, in one go."""
    rows: dict[tuple, list[int]] = {}
    for row, param in enumerate(params):
        if isinstance(param, DTensor):
            rows.setdefault((param.device_mesh, param.placements), []).append(row)
    for together in rows.values():
        counts[together] = summed(counts[together], [params[together[0]]])
    return counts


def before_mine(counts: Tensor, param: Tensor) -> tuple[Tensor, Tensor]:
    """How many entries the pieces in front of this process's hold, and how many all hold.

    Args:
        counts (`torch.Tensor`): This process's number of entries, for each tensor of a list, int64.
        param (`torch.Tensor`): One of the tensors.
    """
    total, before = counts.clone(), torch.zeros_like(counts)
    if isinstance(param, DTensor):
        for group in _groups(param):
            parts = [torch.zeros_like(total) for _ in range(torch.distributed.get_world_size(group))]
            torch.distributed.all_gather(parts, total, group=group)
            before += sum(parts[: torch.distributed.get_rank(group)], torch.zeros_like(total))
            total = sum(parts)
    return before, total


def _groups(param: DTensor) -> list[torch.distributed.ProcessGroup]:
    """The processes that hold different pieces, innermost first."""
    mesh = param.device_mesh
    sharded = [dim for dim, placement in enumerate(param.placements) if placement.is_shard()]
    return [mesh.get_group(dim) for dim in reversed(sharded)]
