"""Parameters that several processes hold in pieces (FSDP2's DTensor): what is put together, what is summed over all.

Everything here does nothing for ordinary tensors.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def several_processes() -> bool:
    """Whether there are others to put together with what is known here."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def average_tensor(tensor: Tensor) -> None:
    """Average a tensor over all processes, in place."""
    torch.distributed.all_reduce(tensor)
    tensor.div_(torch.distributed.get_world_size())


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold other pieces."""
    return isinstance(tensor, DTensor) and any(placement.is_shard() for placement in tensor.placements)


def has_whole_rows(tensor: Tensor, dim: int) -> bool:
    """Whether what is here of a weight holds all of its input features, which lie along `dim`."""
    return not isinstance(tensor, DTensor) or not any(
        placement.is_shard(tensor.dim() - 2 + dim) for placement in tensor.placements
    )


def whole(tensor: Tensor) -> Tensor:
    """The tensor as a whole, the same in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(vector: Tensor, param: Tensor) -> Tensor:
    """Put what broadcasts over a parameter to where its pieces are.

    Args:
        vector (`torch.Tensor`): Shape (n, 1) or (1, m), the same in every process; of experts (e, n, 1) or (e, 1, m).
        param (`torch.Tensor`): Shape (n, m), or (e, n, m).
    """
    if not isinstance(param, DTensor):
        return vector
    placements = [
        Replicate() if placement.is_shard() and vector.shape[placement.dim] == 1 else placement
        for placement in param.placements
    ]
    return distribute_tensor(vector, param.device_mesh, placements, src_data_rank=None)


def groups_of(param: Tensor) -> list[ProcessGroup]:
    """The processes that hold different pieces of a parameter, innermost first; none if this one holds it all."""
    if not isinstance(param, DTensor):
        return []
    mesh = param.device_mesh
    sharded = [dim for dim, placement in enumerate(param.placements) if placement.is_shard()]
    return [mesh.get_group(dim) for dim in reversed(sharded)]


def summed(counts: Tensor, groups: list[ProcessGroup]) -> Tensor:
    """Sum what each process has counted in its pieces: one small all-reduce per group, see [`groups_of`]."""
    for group in groups:
        torch.distributed.all_reduce(counts, group=group)
    return counts


def summed_rows(counts: Tensor, groups: list[list[ProcessGroup]]) -> Tensor:
    """Sum each row of `counts` over its groups, all rows of the same groups in one go."""
    rows: dict[tuple[ProcessGroup, ...], list[int]] = {}
    for row, its_groups in enumerate(groups):
        rows.setdefault(tuple(its_groups), []).append(row)
    for its_groups, together in rows.items():
        if its_groups:
            counts[together] = summed(counts[together], list(its_groups))
    return counts


def before_mine(counts: Tensor, groups: list[ProcessGroup]) -> tuple[Tensor, Tensor]:
    """How many entries the pieces in front of this process's hold, and how many all hold.

    Args:
        counts (`torch.Tensor`): This process's number of entries, for each tensor of a list, int64.
        groups (`list[ProcessGroup]`): See [`groups_of`].
    """
    total, before = counts.clone(), torch.zeros_like(counts)
    for group in groups:
        parts = [torch.zeros_like(total) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, total, group=group)
        before += sum(parts[: torch.distributed.get_rank(group)], torch.zeros_like(total))
        total = sum(parts)
    return before, total
