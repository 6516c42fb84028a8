"""Weight updates that reconstruct a layer's output while weights are pruned (optimal brain surgeon)."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..optim.pieces import local
from .activations import hook_inputs
from .experts import first_expert, hook_expert_inputs
from .reconstruction import reconstruct
from .sharding import average_tensor, has_whole_rows, several_processes


# Largest block of the Hessian: larger ones cost more than the weights that they belong to.
MAX_BLOCK = 2048
# Calibration samples (tokens) of one forward pass, spread evenly over all of its tokens.
MAX_TOKENS = 4096


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
        on_cpu (`bool`, *optional*, defaults to `False`): Hold the Hessians in CPU memory. Each batch's product is moved
            there, and at a plan one layer's sum after the other is moved to the weights.
        improve_mask (`Callable`, *optional*): See [`~.reconstruction.reconstruct`].
    """

    def __init__(
        self,
        model: nn.Module,
        dims: dict[Tensor, int],
        optimizer: torch.optim.Optimizer,
        on_cpu: bool = False,
        improve_mask: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ):
        self.collecting = True
        self._improve_mask = improve_mask
        self._on_cpu = on_cpu
        # A process that holds parts of rows cannot solve for them: such weights get no update.
        self._dims = {param: dim for param, dim in dims.items() if has_whole_rows(param, dim)}
        self._optimizer = optimizer
        self._last: tuple[weakref.ref | None, Tensor | None] = (None, None)
        if on_cpu:  # an optimizer loads its state to where the weights are
            moved: dict[int, Tensor] = {}
            for state in (optimizer.state[param] for param in self._dims if "lp_gram" in optimizer.state[param]):
                gram = state["lp_gram"]
                state["lp_gram"] = moved.setdefault(id(gram), gram.cpu())
        self._handles = hook_inputs(model, list(self._dims), self._collect)
        self._handles += hook_expert_inputs(model, list(self._dims), self._collect_expert)

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
            product = self._held(_hessian(tokens, size))
            gram = state["lp_gram"].add_(product) if "lp_gram" in state else product
            self._last = weakref.ref(features), gram
        state["lp_gram"] = gram

    @torch.no_grad()
    def _collect_expert(self, weight: Tensor, expert: int, features: Tensor) -> None:
        if not self.collecting:
            return
        state, size = self._optimizer.state[weight], block_size(features.shape[-1])
        if "lp_gram" not in state:
            shape = (weight.shape[0], features.shape[-1] // size, size, size)
            state["lp_gram"] = self._held(features.new_zeros(shape, dtype=torch.float32))
        state["lp_gram"][expert] += self._held(_hessian(features, size))

    def _held(self, product: Tensor) -> Tensor:
        return product.cpu() if self._on_cpu else product

    def finish(self) -> None:
        """Remove the hooks and free the Hessians."""
        self.remove_hooks()
        for param in self._dims:
            self.free(param)

    def free(self, param: Tensor) -> None:
        """Free a weight's Hessian, which goes with the last layer that shares it, and its pending update."""
        self._last = (None, None)
        for name in ("lp_gram", "lp_move"):
            self._optimizer.state[param].pop(name, None)

    def remove_hooks(self) -> None:
        """Remove the hooks."""
        self.collecting = False  # a compiled model does not notice that its hooks were removed
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._last = (None, None)

    def average(self) -> None:
        """Average the Hessians over all processes. Later samples are averaged together with this: only ratios count."""
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
            on_device = gram.to(device)  # where the processes meet
            average_tensor(on_device)
            gram.copy_(on_device)

    @torch.no_grad()
    def advance(self, param: Tensor, share: float) -> None:
        """Apply a share of a weight's pending update; zeros stay zero."""
        if "lp_move" in self._optimizer.state.get(param, ()):
            weight, move = local(param), local(self._optimizer.state[param]["lp_move"])
            weight.add_(move.masked_fill_(weight == 0, 0.0), alpha=share)

    @torch.no_grad()
    def apply(self, param: Tensor, pruned: Tensor, already_pruned: Tensor, gradually: bool = False) -> Tensor:
        """Update the remaining weights of a tensor. The pruned ones are left as they are.

        Args:
            param (`torch.Tensor`): The weight. Overwritten.
            pruned (`torch.Tensor`): The pruning mask, `True` where a weight becomes zero; bool, broadcasts over this
                process's part of the weight.
            already_pruned (`torch.Tensor`): Which of them an earlier update has compensated for, likewise.
            gradually (`bool`, *optional*, defaults to `False`): Only store the update, for [`advance`] to apply.
                Weights of less than float32, in which a share of it would be rounded away, are updated at once, and so
                are frozen ones, of which nothing of their size is kept.

        Returns:
            `torch.Tensor`: The pruning mask, with the zeros that there were, and improved if `improve_mask` does that.
        """
        state = self._optimizer.state[param]
        state.pop("lp_move", None)
        if "lp_gram" not in state:  # no samples yet, as in a ramp that begins with the training
            return pruned
        weight, move = local(param), local(param)
        if gradually and param.dtype == torch.float32 and param.requires_grad:
            state["lp_move"] = torch.zeros_like(param)
            move = local(state["lp_move"])
        pruned = pruned.expand(weight.shape) | (weight == 0)
        already_pruned = already_pruned.expand(weight.shape)
        tensors, gram = (weight, move, pruned, already_pruned), state["lp_gram"]
        if self._dims[param] == 0:
            tensors = tuple(tensor.transpose(-1, -2) for tensor in tensors)
        if param.dim() == 2:
            self._update(*tensors, gram.to(weight.device))
            return pruned
        first = first_expert(param)
        for expert in range(len(weight)):
            if gram[first + expert].any():  # an expert that got no token has no Hessian
                self._update(*(tensor[expert] for tensor in tensors), gram[first + expert].to(weight.device))
        return pruned

    def _update(self, weight: Tensor, move: Tensor, pruned: Tensor, already_pruned: Tensor, gram: Tensor) -> None:
        """Add the update of a matrix, shape (out, in), to `move`, and write the improved mask to `pruned`."""
        reference = weight.masked_fill(already_pruned & pruned, 0.0)
        change, mask = reconstruct(reference, pruned, gram, self._improve_mask)
        move.add_(change.sub_(reference).masked_fill_(mask, 0.0))
        pruned.copy_(mask)


def _hessian(tokens: Tensor, size: int) -> Tensor:
    """The diagonal blocks of ``X^T X``, shape (blocks, size, size), of the features X, shape (tokens, features)."""
    samples = sample_tokens(tokens)
    with torch.autocast(tokens.device.type, enabled=False):
        blocks = samples.float().unflatten(1, (-1, size)).transpose(0, 1)
        product = (blocks.transpose(1, 2) @ blocks).mul_(len(tokens) / max(1, len(samples)))
    return product.masked_fill_(~product.isfinite().all(), 0.0)  # an overflow: that step is skipped


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
