"""Better pruning masks: a row exchanges pruned for remaining weights as long as its layer's error falls."""

import torch
from torch import Tensor

from .reconstruction import Solver


def swap(
    solver: Solver, start: Tensor, keep: Tensor, solution: Tensor, rounds: int, group: int = 1
) -> tuple[Tensor, Tensor]:
    """Exchange pruned and remaining weights of each row, as many of one as of the other.

    As 1-swaps (arXiv 2512.10922), but many at a time, and with the update of all remaining weights in mind: a pruned
    weight has the error by which it would lower that of the solution, a remaining one that by which its loss would
    raise it. The best of the first take the places of the cheapest of the second. A row whose error does not fall takes
    its mask back, and tries fewer swaps in the next round. What was zero before stays zero.

    Args:
        solver (`Solver`): Of the layer.
        start (`torch.Tensor`): The weights before they are pruned, shape (blocks, rows, size).
        keep (`torch.Tensor`): 0 where they are pruned and 1 elsewhere, likewise.
        solution (`torch.Tensor`): What [`Solver.solve`] returns for these.
        rounds (`int`): How many times a mask is changed and solved for.
        group (`int`, *optional*, defaults to `1`): Swap within each `group` consecutive weights only, as n:m needs it;
            with 1 in the whole row.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `keep` and `solution` of the better masks.
    """
    if start.shape[2] % group:  # a group lies in two blocks
        return keep, solution
    residual = solver.residual(start, solution)
    error = _error(start, solution, residual)
    share = torch.full_like(error, 0.5)
    for _ in range(rounds):
        gain, cost = solver.precondition.values(residual, solution, keep)
        gain = gain.masked_fill_((keep > 0) | (start == 0), 0.0)
        cost = cost.masked_fill_(keep == 0, torch.inf)
        tried = _swap_some(keep, gain, cost, share, group)
        solved = solver.solve(start, tried)
        new_residual = solver.residual(start, solved)
        new_error = _error(start, solved, new_residual)
        better = new_error < error
        keep, solution, residual, error = (
            torch.where(better, new, old)
            for new, old in ((tried, keep), (solved, solution), (new_residual, residual), (new_error, error))
        )
        share = torch.where(better, share, share / 4)
    return keep, solution


def _error(start: Tensor, solution: Tensor, residual: Tensor) -> Tensor:
    return ((start - solution) * residual).sum(2, keepdim=True)


def _swap_some(keep: Tensor, gain: Tensor, cost: Tensor, share: Tensor, group: int) -> Tensor:
    """Swap that share of the pairs which are worth it; of a group of n:m, one pair at most."""
    if group > 1:
        best, cheapest = (x.unflatten(2, (-1, group)) for x in (gain, cost))
        (gain, first), (cost, second) = best.max(3), cheapest.min(3)
        offset = torch.arange(0, keep.shape[2], group, device=keep.device)
        order = (gain - cost).argsort(2, descending=True)
        enters, leaves = ((offset + x).gather(2, order) for x in (first, second))
        gain, cost = gain.gather(2, order), cost.gather(2, order)
    else:
        gain, enters = gain.sort(2, descending=True)
        cost, leaves = cost.sort(2)
    worth = (gain > cost).sum(2, keepdim=True)
    chosen = torch.arange(gain.shape[2], device=keep.device) < (share * worth).ceil()
    tried = keep.clone()
    tried.scatter_(2, enters, torch.where(chosen, 1.0, keep.gather(2, enters)))
    return tried.scatter_(2, leaves, torch.where(chosen, 0.0, tried.gather(2, leaves)))
