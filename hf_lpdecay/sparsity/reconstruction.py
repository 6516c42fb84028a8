"""The solver of `Compensation`: pruned weights that reconstruct a layer's output, by conjugate gradients."""

from collections.abc import Callable

import torch
from torch import Tensor


# Iterations of conjugate gradients. With the preconditioner three of them come within two or three per cent of the
# exact solution, in most layers.
ITERATIONS = 3
# Eigenvectors in the preconditioner, and the subspace iterations that find them.
RANK, SUBSPACE_ITERATIONS = 16, 4
# Added to the diagonal, as a fraction of its mean (SparseGPT's).
DAMPING = 0.01
# Least mean of the eigenvalues of a matrix with a diagonal of ones, so that nothing divides by zero.
MIN_REST = 1e-4
# Elements per chunk of rows: half a dozen tensors of this size are the scratch.
_CHUNK = 1 << 20


def reconstruct(
    weight: Tensor, pruned: Tensor, gram: Tensor, improve_mask: Callable[..., tuple[Tensor, Tensor]] | None = None
) -> tuple[Tensor, Tensor]:
    """Pruned weights that reconstruct the layer's output best.

    Minimises ``(v - w) H (v - w)^T`` for each row ``w`` over the rows ``v`` that are zero where `pruned` is.

    Args:
        weight (`torch.Tensor`): Shape (out, in).
        pruned (`torch.Tensor`): The pruning mask, `True` where the result is zero; bool, shape (out, in).
        gram (`torch.Tensor`): Blocks of ``H`` along its diagonal, float32, shape (blocks, size, size).
        improve_mask (`Callable`, *optional*): Called with the solver, weights, mask and solution of some rows; returns
            another mask and its solution, see [`~.swaps.swap`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The weights, float32, and their pruning mask; shape (out, in).
    """
    solver = Solver(gram)
    rows = max(1, _CHUNK // weight.shape[1])
    result, mask = torch.empty(weight.shape, dtype=torch.float32, device=weight.device), pruned
    if improve_mask is not None:
        mask = torch.empty_like(pruned)
    for values, before, solution, after in zip(*(tensor.split(rows) for tensor in (weight, pruned, result, mask))):
        start, keep = (x.float().unflatten(1, (len(gram), -1)).transpose(0, 1) for x in (values, ~before))
        solved = solver.solve(start, keep)
        if improve_mask is not None:
            keep, solved = improve_mask(solver, start, keep, solved)
            after.copy_(keep.transpose(0, 1).flatten(1) == 0)
        solution.copy_(solved.transpose(0, 1).flatten(1))
    return result, mask


class Solver:
    """Solves for pruned rows by preconditioned conjugate gradients. All rows have the shape (blocks, rows, size).

    Args:
        gram (`torch.Tensor`): Blocks of ``H`` along its diagonal, float32, shape (blocks, size, size).
    """

    def __init__(self, gram: Tensor):
        self.hessian = gram.clone()
        damping = DAMPING * gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        self.hessian.diagonal(dim1=1, dim2=2).add_(damping)
        self.precondition = Preconditioner(self.hessian)

    def solve(self, start: Tensor, keep: Tensor) -> Tensor:
        """The rows that reconstruct `start` and are zero where `keep` is, which is 1 elsewhere."""
        solution = start * keep
        residual = self.residual(start, solution).mul_(keep)
        inverse = self.precondition.restricted(keep)
        scaled = self.precondition(residual, keep, inverse)
        direction, norm = scaled.clone(), (residual * scaled).sum(2, keepdim=True)
        for i in range(ITERATIONS):
            image = (direction @ self.hessian).mul_(keep)
            length = _ratio(norm, (direction * image).sum(2, keepdim=True))
            solution.addcmul_(length, direction)
            if i + 1 == ITERATIONS:
                break
            residual.addcmul_(length, image, value=-1)
            scaled = self.precondition(residual, keep, inverse)
            last_norm, norm = norm, (residual * scaled).sum(2, keepdim=True)
            direction.mul_(_ratio(norm, last_norm)).add_(scaled)
        return solution

    def residual(self, start: Tensor, solution: Tensor) -> Tensor:
        """Half the negative gradient of the error with respect to `solution`."""
        return (start - solution) @ self.hessian


class Preconditioner:
    """A low-rank approximation of the inverse of each row's ``H``, restricted to the features that the row keeps.

    Few eigenvectors explain most of the correlation of a language model's features. ``S``, which is ``H`` scaled to a
    unit diagonal, with largest eigenvalues ``L`` and eigenvectors ``V``, is approximated by ``c I + V (L - c I) V^T``,
    where ``c`` is the mean of the other eigenvalues. Each row's submatrix of it is inverted with Woodbury's identity.

    Args:
        hessian (`torch.Tensor`): Damped, shape (blocks, size, size).
    """

    def __init__(self, hessian: Tensor):
        size = hessian.shape[-1]
        diagonal = hessian.diagonal(dim1=1, dim2=2)[:, None]
        self._scale = _ratio(torch.ones_like(diagonal), diagonal).sqrt()
        similar = hessian * self._scale * self._scale.transpose(1, 2)
        rank = min(RANK, size // 4)
        vectors = similar[:, :, :rank]
        for _ in range(SUBSPACE_ITERATIONS):
            vectors = similar @ torch.linalg.qr(vectors)[0]
        vectors = torch.linalg.qr(vectors)[0]
        values, rotation = torch.linalg.eigh(vectors.transpose(1, 2) @ similar @ vectors)
        self._vectors = vectors @ rotation
        alive = (diagonal > 0).sum(2)
        rest = ((alive - values.sum(1, keepdim=True)) / (size - rank)).clamp(min=MIN_REST)[:, :, None]
        self._rest, self._scale_by_rest = rest, self._scale / rest
        self._ratio = torch.diag_embed(rest[:, :, 0] / (values - rest[:, :, 0]).clamp(min=MIN_REST))[:, None]
        self._products = (self._vectors[:, :, :, None] * self._vectors[:, :, None, :]).flatten(2)

    def restricted(self, keep: Tensor) -> Tensor:
        """The inverse in Woodbury's identity for each row, shape (blocks, rows, rank, rank).

        Args:
            keep (`torch.Tensor`): 1 where a row keeps a feature and 0 elsewhere, shape (blocks, rows, size).
        """
        rank = self._vectors.shape[2]
        return torch.linalg.inv((keep @ self._products).unflatten(2, (rank, rank)) + self._ratio)

    def values(self, residual: Tensor, solution: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """By how much the error falls when a pruned weight is kept, and rises when a kept one is pruned.

        Each with the update of all others that follows it (optimal brain surgeon's saliency).

        Args:
            residual (`torch.Tensor`): From [`Solver.residual`]; shape (blocks, rows, size).
            solution (`torch.Tensor`): The rows that `keep` leads to; shape (blocks, rows, size).
            keep (`torch.Tensor`): See [`restricted`].

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: For each weight what it would gain, which only holds where `keep` is 0,
            and what it would cost, which only holds where `keep` is 1.
        """
        explained = self.restricted(keep).flatten(2) @ self._products.transpose(1, 2)
        gain = (residual * self._scale).square_().div_(self._rest * (1 + explained))
        cost = _ratio(solution, self._scale).square_().mul_(self._rest).div_((1 - explained).clamp_(min=MIN_REST))
        return gain, cost

    def __call__(self, residual: Tensor, keep: Tensor, inverse: Tensor) -> Tensor:
        """Approximate ``residual H^-1`` on the features that each row keeps; shape (blocks, rows, size)."""
        scaled = residual * self._scale
        known = ((scaled @ self._vectors)[:, :, None] @ inverse)[:, :, 0]
        scaled -= (known @ self._vectors.transpose(1, 2)).mul_(keep)
        return scaled.mul_(self._scale_by_rest)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)
