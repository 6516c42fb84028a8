"""Weight updates that reconstruct a layer's output while weights are pruned (optimal brain surgeon)."""

import weakref

import torch
from torch import Tensor, nn

from ..optim.pieces import local
from .activations import hook_inputs
from .sharding import has_whole_rows, several_processes


# Largest block of the Hessian: larger ones cost more than the weights that they belong to.
MAX_BLOCK = 2048
# Calibration samples (tokens) of one forward pass, spread evenly over all of its tokens.
MAX_TOKENS = 4096
# Iterations of conjugate gradients. With the preconditioner three of them come within two or three per cent of the
# exact solution, in most layers.
ITERATIONS = 3
# Eigenvectors in the preconditioner, and the subspace iterations that find them.
RANK, SUBSPACE_ITERATIONS = 16, 4
# Added to the diagonal, as a fraction of its mean (SparseGPT's).
DAMPING = 0.01
# Least mean of the eigenvalues of a matrix with a diagonal of ones, so that nothing divides by zero.
MIN_REST = 1e-4
# Elements per chunk of rows.
_CHUNK = 1 << 22


class Compensation:
    """Updates the remaining weights while others are pruned: optimal brain surgeon's update, for all of them at once.

    Forward hooks sum the Hessian of each layer over a few batches, ``H = X^T X`` with its input features ``X``
    (as SparseGPT, arXiv 2301.00774; a batch of more than 4,096 tokens is sampled). When weights of a row are pruned,
    the remaining weights of that row are updated to minimise the change of the layer's output on these batches. The
    update is applied step by step, in proportion to how far the pruned weights have decayed.

    The Hessian and the pending update are kept in the optimizer's state (`lp_gram` and `lp_move`), so that a checkpoint
    holds them. Layers with the same input share one Hessian.

    Args:
        model (`nn.Module`): Holds the layers.
        dims (`dict[torch.Tensor, int]`): The selected weights, and the dimension of the input features of each.
        optimizer (`torch.optim.Optimizer`): Steps them.
    """

    def __init__(self, model: nn.Module, dims: dict[Tensor, int], optimizer: torch.optim.Optimizer):
        self.collecting = True
        # A process that holds parts of rows cannot solve for them: such weights get no update.
        self._dims = {param: dim for param, dim in dims.items() if has_whole_rows(param, dim)}
        self._optimizer = optimizer
        self._last: tuple[weakref.ref | None, Tensor | None] = (None, None)
        self._handles = hook_inputs(model, list(self._dims), self._collect)

    @torch.no_grad()
    def _collect(self, weight: Tensor, features: Tensor) -> None:
        if not self.collecting:
            return
        state = self._optimizer.state[weight]
        last, gram = self._last
        shared = last is not None and last() is features
        # The same features were added for the last layer, unless this one has a Hessian of its own from a checkpoint.
        if not shared or state.get("lp_gram", gram) is not gram:
            size, tokens = block_size(features.shape[-1]), features.detach().flatten(0, -2)
            samples = sample_tokens(tokens)
            with torch.autocast(features.device.type, enabled=False):
                blocks = samples.float().unflatten(1, (-1, size)).transpose(0, 1)
                product = (blocks.transpose(1, 2) @ blocks).mul_(len(tokens) / max(1, len(samples)))
            product.masked_fill_(~product.isfinite().all(), 0.0)  # an overflow: that step is skipped
            gram = state["lp_gram"].add_(product) if "lp_gram" in state else product
            self._last = weakref.ref(features), gram
        state["lp_gram"] = gram

    def finish(self) -> None:
        """Remove the hooks and free the Hessians."""
        self.remove_hooks()
        for param in self._dims:
            for name in ("lp_gram", "lp_move"):
                self._optimizer.state[param].pop(name, None)

    def remove_hooks(self) -> None:
        """Remove the hooks."""
        self.collecting = False  # a compiled model does not notice that its hooks were removed
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._last = (None, None)

    def all_reduce(self) -> None:
        """Average the Hessians over all processes."""
        if not several_processes():
            return
        params = list(self._dims)
        if not params:
            return
        state, device = self._optimizer.state, params[0].device
        collected = torch.tensor([float("lp_gram" in state[param]) for param in params], device=device)
        torch.distributed.all_reduce(collected, torch.distributed.ReduceOp.MIN)
        grams = {}
        for param, everywhere in zip(params, collected.tolist()):
            if everywhere:
                grams[id(state[param]["lp_gram"])] = state[param]["lp_gram"]
            else:  # an expert that got no token in one of them
                state[param].pop("lp_gram", None)
        for gram in grams.values():
            # The mean, since it is reduced again at the next plan together with later samples. Only ratios count.
            torch.distributed.all_reduce(gram)
            gram.div_(torch.distributed.get_world_size())

    @torch.no_grad()
    def advance(self, param: Tensor, share: float) -> None:
        """Apply a share of a weight's pending update; zeros stay zero."""
        if "lp_move" in self._optimizer.state.get(param, ()):
            weight, move = local(param), local(self._optimizer.state[param]["lp_move"])
            weight.add_(move.masked_fill_(weight == 0, 0.0), alpha=share)

    @torch.no_grad()
    def apply(self, param: Tensor, pruned: Tensor, already_pruned: Tensor, gradually: bool = False) -> None:
        """Update the remaining weights of a tensor. The pruned ones are left as they are.

        Args:
            param (`torch.Tensor`): The weight. Overwritten.
            pruned (`torch.Tensor`): The pruning mask, `True` where a weight becomes zero; bool, broadcasts over this
                process's part of the weight.
            already_pruned (`torch.Tensor`): Which of them an earlier update has compensated for, likewise.
            gradually (`bool`, *optional*, defaults to `False`): Only store the update, for [`advance`] to apply.
                Weights of less than float32, in which a share of it would be rounded away, are updated at once.
        """
        state = self._optimizer.state[param]
        state.pop("lp_move", None)
        if "lp_gram" not in state:  # no samples yet, as in a ramp that begins with the training
            return
        weight, move = local(param), local(param)
        if gradually and param.dtype == torch.float32:
            state["lp_move"] = torch.zeros_like(param)
            move = local(state["lp_move"])
        pruned = pruned.expand(weight.shape) | (weight == 0)
        already_pruned = already_pruned.expand(weight.shape)
        if self._dims[param] == 0:
            weight, move, pruned, already_pruned = weight.t(), move.t(), pruned.t(), already_pruned.t()
        rows = max(1, _CHUNK // weight.shape[1])
        for chunk, update, mask, done in zip(*(x.split(rows) for x in (weight, move, pruned, already_pruned))):
            reference = chunk.masked_fill(done & mask, 0.0)
            change = reconstruct(reference, mask, state["lp_gram"]) - reference.float()
            update.add_(change.masked_fill_(mask, 0.0))


def sample_tokens(tokens: Tensor) -> Tensor:
    """At most 4,096 rows, spread evenly, but not at equal distances, which would prefer some positions in the texts."""
    count = len(tokens)
    if count <= MAX_TOKENS:
        return tokens
    numbers = torch.arange(MAX_TOKENS + 1, device=tokens.device)
    first = numbers * count // MAX_TOKENS
    # One row of each interval: multiples of the golden ratio, modulo 1, have no period.
    return tokens[first[:-1] + ((numbers[:-1] * 0.618034).frac() * first.diff()).long()]


def block_size(features: int) -> int:
    """Size of the Hessian's blocks: the largest divisor of the number of input features up to 2048."""
    return next(features // n for n in range(1, features + 1) if features % n == 0 and features // n <= MAX_BLOCK)


def reconstruct(weight: Tensor, pruned: Tensor, gram: Tensor) -> Tensor:
    """Pruned weights that reconstruct the layer's output best, by preconditioned conjugate gradients.

    Minimises ``(v - w) H (v - w)^T`` for each row ``w`` over the rows ``v`` that are zero where `pruned` is.

    Args:
        weight (`torch.Tensor`): Shape (out, in).
        pruned (`torch.Tensor`): The pruning mask, `True` where the result is zero; bool, shape (out, in).
        gram (`torch.Tensor`): Blocks of ``H`` along its diagonal, float32, shape (blocks, size, size).

    Returns:
        `torch.Tensor`: float32, shape (out, in).
    """
    blocks, size, _ = gram.shape

    def split(x: Tensor) -> Tensor:
        return x.unflatten(1, (blocks, size)).transpose(0, 1)

    keep, start = split(~pruned).float(), split(weight.float())
    damping = DAMPING * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    precondition = Preconditioner(gram, damping, keep)
    solution = start * keep
    residual = _product(start - solution, gram, damping) * keep
    scaled = precondition(residual)
    direction, norm = scaled.clone(), (residual * scaled).sum(2, keepdim=True)
    for _ in range(ITERATIONS):
        image = _product(direction, gram, damping) * keep
        length = _ratio(norm, (direction * image).sum(2, keepdim=True))
        solution += length * direction
        residual -= length * image
        scaled = precondition(residual)
        last_norm, norm = norm, (residual * scaled).sum(2, keepdim=True)
        direction = scaled + _ratio(norm, last_norm) * direction
    return solution.transpose(0, 1).flatten(1)


class Preconditioner:
    """A low-rank approximation of the inverse of each row's ``H``, restricted to the features that the row keeps.

    Few eigenvectors explain most of the correlation of a language model's features. ``S``, which is ``H`` scaled to a
    unit diagonal, with largest eigenvalues ``L`` and eigenvectors ``V``, is approximated by ``c I + V (L - c I) V^T``,
    where ``c`` is the mean of the other eigenvalues. Each row's submatrix of it is inverted with Woodbury's identity.

    Args:
        gram (`torch.Tensor`): Shape (blocks, size, size).
        damping (`torch.Tensor`): Added to its diagonal, shape (blocks, 1, 1).
        keep (`torch.Tensor`): 1 where a row keeps a feature and 0 elsewhere, shape (blocks, out, size).
    """

    def __init__(self, gram: Tensor, damping: Tensor, keep: Tensor):
        size = gram.shape[-1]
        diagonal = gram.diagonal(dim1=1, dim2=2)[:, None] + damping
        self._keep = keep
        self._scale = _ratio(torch.ones_like(diagonal), diagonal).sqrt()
        similar = gram * self._scale * self._scale.transpose(1, 2)
        similar.diagonal(dim1=1, dim2=2).add_((damping * self._scale.square())[:, 0])
        rank = min(RANK, size // 4)
        vectors = similar[:, :, :rank]
        for _ in range(SUBSPACE_ITERATIONS):
            vectors = similar @ torch.linalg.qr(vectors)[0]
        vectors = torch.linalg.qr(vectors)[0]
        values, rotation = torch.linalg.eigh(vectors.transpose(1, 2) @ similar @ vectors)
        self._vectors = vectors @ rotation
        alive = (diagonal > 0).sum(2)
        self._rest = ((alive - values.sum(1, keepdim=True)) / (size - rank)).clamp(min=MIN_REST)[:, :, None]
        ratio = self._rest[:, :, 0] / (values - self._rest[:, :, 0]).clamp(min=MIN_REST)
        products = (self._vectors[:, :, :, None] * self._vectors[:, :, None, :]).flatten(2)
        system = (keep @ products).unflatten(2, (rank, rank)) + torch.diag_embed(ratio)[:, None]
        self._inverse = torch.linalg.inv(system)

    def __call__(self, residual: Tensor) -> Tensor:
        """Approximate ``residual H^-1`` between the features that each row keeps; shape (blocks, out, size)."""
        scaled = residual * self._scale
        known = ((scaled @ self._vectors)[:, :, None] @ self._inverse)[:, :, 0]
        return (scaled - known @ self._vectors.transpose(1, 2) * self._keep) / self._rest * self._scale


def _product(x: Tensor, gram: Tensor, damping: Tensor) -> Tensor:
    return x @ gram + damping * x


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)
