"""What survives makes up for what becomes zero, layer by layer."""

import weakref

import torch
from torch import Tensor, nn

from ..optim.pieces import local
from .activations import on_inputs
from .sharding import has_whole_rows, several_processes


# Input features that are compared with each other: more of them cost more than the weights that they belong to.
MAX_BLOCK = 2048
# Of more tokens in one forward pass as many are heard, spread evenly.
MAX_TOKENS = 4096
# Iterations of conjugate gradients. With the preconditioner three come within two or three per cent of the best that
# there is, in most layers.
ITERATIONS = 3
# Eigenvectors that the preconditioner knows, and how often they are sharpened.
RANK, SUBSPACE_ITERATIONS = 16, 4
# Added to the diagonal, as a fraction of its mean (SparseGPT's).
DAMPING = 0.01
# Least mean of the eigenvalues of a matrix with a diagonal of ones, so that nothing divides by zero.
MIN_REST = 1e-4
# Elements that are worked on at a time.
_PIECE = 1 << 22


class Compensation:
    """Keeps the layers' outputs while weights become zero: optimal brain surgeon's step, for all of them at once.

    Of each layer the products of its input features are summed over a few batches by forward hooks, ``H = X^T X``
    (SparseGPT's Hessian, arXiv 2301.00774; of a batch with more than 4,096 tokens it is estimated from as many). While
    weights become zero, the others of the same row move to where the layer's output on these batches changes least, as
    far in each step as those have decayed.

    ``H`` and what a weight is to move by are kept in the optimizer's state (`lp_gram` and `lp_move`), so that a
    checkpoint holds them; layers that read the same features share ``H``.

    Args:
        model (`nn.Module`): Holds the layers.
        dims (`dict[torch.Tensor, int]`): The selected weights, and the dimension of the input features of each.
        optimizer (`torch.optim.Optimizer`): Steps them.
    """

    def __init__(self, model: nn.Module, dims: dict[Tensor, int], optimizer: torch.optim.Optimizer):
        self.listening = True
        # A process that holds parts of rows cannot solve for them: such weights are left alone.
        self._dims = {param: dim for param, dim in dims.items() if has_whole_rows(param, dim)}
        self._state = optimizer.state
        self._last: tuple[weakref.ref | None, Tensor | None] = (None, None)
        self._handles = on_inputs(model, list(self._dims), self._add)

    @torch.no_grad()
    def _add(self, weight: Tensor, features: Tensor) -> None:
        if not self.listening:
            return
        state = self._state[weight]
        before, gram = self._last
        known = before is not None and before() is features
        # What the last layer has read was added already, unless this one is fresh from a checkpoint and has its own.
        if not known or state.get("lp_gram", gram) is not gram:
            size, tokens = block_size(features.shape[-1]), features.detach().flatten(0, -2)
            heard = some(tokens)
            with torch.autocast(features.device.type, enabled=False):
                blocks = heard.float().unflatten(1, (-1, size)).transpose(0, 1)
                product = (blocks.transpose(1, 2) @ blocks).mul_(len(tokens) / max(1, len(heard)))
            product.masked_fill_(~product.isfinite().all(), 0.0)  # an overflow, for which the step is skipped
            gram = state["lp_gram"].add_(product) if "lp_gram" in state else product
            self._last = weakref.ref(features), gram
        state["lp_gram"] = gram

    def finish(self) -> None:
        """Stop listening, and forget what was heard."""
        self.listening = False  # a compiled model does not notice that its hooks are gone
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._last = (None, None)
        for param in self._dims:
            for name in ("lp_gram", "lp_move"):
                self._state[param].pop(name, None)

    def gather(self) -> None:
        """Bring together what all processes have heard."""
        if not several_processes():
            return
        params = list(self._dims)
        if not params:
            return
        heard = torch.tensor([float("lp_gram" in self._state[param]) for param in params], device=params[0].device)
        torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MIN)
        grams = {}
        for param, everywhere in zip(params, heard.tolist()):
            if everywhere:
                grams[id(self._state[param]["lp_gram"])] = self._state[param]["lp_gram"]
            else:  # an expert that got no token in one of them
                self._state[param].pop("lp_gram", None)
        for gram in grams.values():
            # The mean, as it will come round again with what follows. Only ratios count.
            torch.distributed.all_reduce(gram)
            gram.div_(torch.distributed.get_world_size())

    @torch.no_grad()
    def advance(self, param: Tensor, share: float) -> None:
        """Move a weight by a share of what it is to move by; zero stays zero."""
        if "lp_move" in self._state.get(param, ()):
            weight, move = local(param), local(self._state[param]["lp_move"])
            weight.add_(move.masked_fill_(weight == 0, 0.0), alpha=share)

    @torch.no_grad()
    def apply(self, param: Tensor, gone: Tensor, before: Tensor, gradually: bool = False) -> None:
        """Move what survives in a weight. What does not is left as it is.

        Args:
            param (`torch.Tensor`): The weight. Overwritten.
            gone (`torch.Tensor`): Which weights are due to become zero, bool; broadcasts over the part that is here.
            before (`torch.Tensor`): Which of them have been made up for already, likewise.
            gradually (`bool`, *optional*, defaults to `False`): Only write down the move, for [`advance`] to make. Of
                less than float32, in which a share of it would be lost, a weight moves at once all the same.
        """
        state = self._state[param]
        state.pop("lp_move", None)
        if "lp_gram" not in state:  # nothing was heard yet, as in a ramp that begins with the training
            return
        weight, move = local(param), local(param)
        if gradually and param.dtype == torch.float32:
            state["lp_move"] = torch.zeros_like(param)
            move = local(state["lp_move"])
        gone, before = gone.expand(weight.shape) | (weight == 0), before.expand(weight.shape)
        if self._dims[param] == 0:
            weight, move, gone, before = weight.t(), move.t(), gone.t(), before.t()
        rows = max(1, _PIECE // weight.shape[1])
        for piece, moved, mask, done in zip(*(x.split(rows) for x in (weight, move, gone, before))):
            reference = piece.masked_fill(done & mask, 0.0)
            change = compensated(reference, mask, state["lp_gram"]) - reference.float()
            moved.add_(change.masked_fill_(mask, 0.0))


def some(tokens: Tensor) -> Tensor:
    """At most 4,096 rows, spread evenly, but not at equal distances, which would prefer some positions in the texts."""
    count = len(tokens)
    if count <= MAX_TOKENS:
        return tokens
    numbers = torch.arange(MAX_TOKENS + 1, device=tokens.device)
    first = numbers * count // MAX_TOKENS
    # Of each stretch one row: multiples of the golden ratio, modulo 1, have no period.
    return tokens[first[:-1] + ((numbers[:-1] * 0.618034).frac() * first.diff()).long()]


def block_size(features: int) -> int:
    """Into blocks of how many the input features are divided: as many as possible, up to 2048."""
    return next(features // n for n in range(1, features + 1) if features % n == 0 and features // n <= MAX_BLOCK)


def compensated(weight: Tensor, gone: Tensor, gram: Tensor) -> Tensor:
    """Weights with zeros whose layer's output differs least, by preconditioned conjugate gradients.

    Minimises ``(v - w) H (v - w)^T`` for each row ``w`` over the rows ``v`` that are zero where `gone` says.

    Args:
        weight (`torch.Tensor`): Shape (out, in).
        gone (`torch.Tensor`): What is zero in the result, bool, shape (out, in).
        gram (`torch.Tensor`): Blocks of ``H`` along its diagonal, float32, shape (blocks, size, size).

    Returns:
        `torch.Tensor`: float32, shape (out, in).
    """
    blocks, size, _ = gram.shape

    def split(x: Tensor) -> Tensor:
        return x.unflatten(1, (blocks, size)).transpose(0, 1)

    keep, start = split(~gone).float(), split(weight.float())
    damping = DAMPING * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    precondition = Preconditioner(gram, damping, keep)
    solution = start * keep
    residual = _product(start - solution, gram, damping) * keep
    scaled = precondition(residual)
    direction, size_now = scaled.clone(), (residual * scaled).sum(2, keepdim=True)
    for _ in range(ITERATIONS):
        image = _product(direction, gram, damping) * keep
        length = _ratio(size_now, (direction * image).sum(2, keepdim=True))
        solution += length * direction
        residual -= length * image
        scaled = precondition(residual)
        size_before, size_now = size_now, (residual * scaled).sum(2, keepdim=True)
        direction = scaled + _ratio(size_now, size_before) * direction
    return solution.transpose(0, 1).flatten(1)


class Preconditioner:
    """The inverse of ``H`` between the features that a row keeps, but for all except its largest eigenvalues.

    A few directions hold most of what a language model's features have in common. With ``S``, which is ``H`` scaled to
    a diagonal of ones, and its largest eigenvalues ``L`` and vectors ``V``, ``S`` is taken for
    ``c I + V (L - c I) V^T``, where ``c`` is the mean of its other eigenvalues; of that each row's own part is
    inverted (Woodbury's identity).

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
