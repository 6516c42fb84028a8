"""Drives the decay to a target: when it acts, how strongly, on what, and the exact cut at the end."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..optim.functional import structured_size
from .patterns import parse_pattern
from .quantiles import histogram, kth_smallest, lower_edge


if TYPE_CHECKING:  # it checks its pattern with this room
    from ..config import LpDecayConfig


DENSE, DECAY, SETTLE = "dense", "decay", "settle"
MIN_RAMP_STEPS = 10
# AdamW's second moment and the activations say little before a few batches have been seen.
_MIN_IMPORTANCE_STEPS = 5
_PLAN = ("lp_lambda", "lp_threshold", "lp_row", "lp_col", "lp_dim", "lp_rows")


@dataclass(frozen=True)
class Ramp:
    """The schedule of a run that is driven to a target, in optimizer steps.

    Args:
        start (`int`): Steps taken before the first plan; the dense phase.
        end (`int`): Steps taken when the target is cut exactly; the settle phase follows.
        interval (`int`): Steps from one plan to the next.
        target (`float`): Sparsity at the end.
    """

    start: int
    end: int
    interval: int
    target: float

    @classmethod
    def from_config(cls, config: "LpDecayConfig", total_steps: int, warmup_steps: int = 0) -> "Ramp":
        """Place the ramp of `config` in a run.

        Args:
            config (`LpDecayConfig`): With a `target_sparsity`.
            total_steps (`int`): Optimizer steps in the run.
            warmup_steps (`int`, *optional*, defaults to 0): Steps in which the learning rate warms up.

        Raises:
            ValueError: If the ramp has fewer than 10 steps.
        """
        start = max(round(config.ramp_start * total_steps), warmup_steps)
        if config.importance != "magnitude":
            start = max(start, _MIN_IMPORTANCE_STEPS)
        end = round(config.ramp_end * total_steps)
        if end - start < MIN_RAMP_STEPS:
            raise ValueError(
                f"The ramp would have {max(end - start, 0)} optimizer steps, from step {start} to {end} of"
                f" {total_steps}, and needs {MIN_RAMP_STEPS}: train for more steps, warm up for fewer (now"
                f" {warmup_steps}), or move ramp_start={config.ramp_start} and ramp_end={config.ramp_end} apart."
            )
        return cls(start, end, max(1, (end - start) // config.num_plans), config.target_sparsity)

    def phase(self, step: int) -> str:
        """The phase after `step` optimizer steps."""
        if step < self.start:
            return DENSE
        return DECAY if step < self.end else SETTLE

    def sparsity(self, step: int) -> float:
        """The sparsity that is due after `step` optimizer steps: cubic (Zhu and Gupta, arXiv 1710.01878)."""
        progress = min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)
        return self.target * (1.0 - (1.0 - progress) ** 3)

    def next_plan(self, step: int) -> int | None:
        """The step of the plan (or cut) after the one at `step`, or `None` if nothing is planned at `step`."""
        if not self.start <= step < self.end or (step - self.start) % self.interval:
            return None
        following = step + self.interval
        # A last interval shorter than the others would ask for the impossible: it joins the one before.
        return following if following + self.interval <= self.end else self.end


class SparsityController:
    """Drives selected parameters of an [`~hf_lpdecay.LpAdamW`] to a target sparsity.

    Every few steps it plans, for each tensor: how many weights are due to be zero at the next plan, the size ``q``
    below which they lie, and the strength that takes a weight of that size to zero by then. Under decay alone
    ``r ** (2 - p)`` falls by ``(2 - p) * lambda * lr`` in a step, so with ``A`` the learning rate summed until then,
    ``lambda = q ** (2 - p) / ((2 - p) * A)``. If `trim` is set, all but the weights below ``q`` are exempt. From the
    first plan on, what is zero stays zero.

    The plan lives in the optimizer's state, and what has been done so far in the weights' own zeros, so that the
    optimizer's and the model's checkpoints hold everything that a resumed run needs.

    Args:
        config (`LpDecayConfig`): With a `target_sparsity`.
        params (`dict[str, torch.Tensor]`): The selected parameters by name.
        optimizer (`LpAdamW`): Holds them, best in groups that hold nothing else.
        ramp (`Ramp`): The schedule.
        input_dims (`dict[str, int]`, *optional*): For each parameter the dimension of the input features, if it is
            not 1 (as in GPT-2's `Conv1D`).

    Raises:
        ValueError: If a parameter's shape does not fit the pattern.
    """

    def __init__(
        self,
        config: "LpDecayConfig",
        params: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        ramp: Ramp,
        input_dims: dict[str, int] | None = None,
    ):
        self.config = config
        self.params = params
        self.optimizer = optimizer
        self.ramp = ramp
        self.pattern = parse_pattern(config.pattern)
        self._dims = {param: (input_dims or {}).get(name, 1) for name, param in params.items()}
        self.pattern.check_all(params, input_dims or {})
        self._ids = {id(param) for param in params.values()}

    @torch.no_grad()
    def after_step(self, step: int, summed_lr: Callable[[int], list[float]]) -> None:
        """Plan or cut, if it is time.

        Args:
            step (`int`): Optimizer steps taken so far.
            summed_lr (`Callable[[int], list[float]]`): Sum of the learning rate over the next so many steps, for
                each of the optimizer's groups.
        """
        if step == self.ramp.end:
            self._finish()
            return
        following = self.ramp.next_plan(step)
        if following is not None:
            if self.config.importance == "adam":
                self._importance_from_adam()
            elif self.config.importance == "activation" and step == self.ramp.start:
                self._importance_from_activations()
            self._plan(step, following, summed_lr(following - step))

    def lp_lambda(self) -> float:
        """The strength that is planned now, averaged over the selected weights."""
        state = self.optimizer.state
        return sum(state[p].get("lp_lambda", 0.0) * p.numel() for p in self.params.values()) / self._numel()

    def _plan(self, step: int, following: int, summed_lr: list[float]) -> None:
        sparsity = self.ramp.sparsity(following)
        if self.config.scope == "global":
            counts = sum(histogram(self._size(param)) for param in self.params.values())
            threshold = lower_edge(counts, max(1, self.pattern.count(sparsity, self._numel())))
        self._freeze_zeros()
        power = 2.0 - self.config.p
        for group, lr in zip(self.optimizer.param_groups, summed_lr):
            for param in self._selected(group):
                if self.config.scope == "layer":
                    due = max(1, self.pattern.count(sparsity, param.numel()))
                    threshold = lower_edge(histogram(self._size(param)), due)
                state = self.optimizer.state[param]
                if self.pattern.spec is not None:
                    group["pattern"] = self.pattern.spec
                    state["lp_dim"] = self._dims[param]
                    state["lp_rows"] = self.pattern.rows(self._dims[param])
                state["lp_lambda"] = threshold**power / (power * lr) if lr > 0 else 0.0
                if self.config.trim:
                    state["lp_threshold"] = threshold

    def cut(self, sparsity: float) -> None:
        """Set exactly the smallest weights to zero, as many as `sparsity` says, and freeze all zeros.

        Args:
            sparsity (`float`): Fraction of each tensor, or of all of them together with `scope="global"`.
        """
        params = list(self.params.values())
        for competitors in [params] if self.config.scope == "global" else [[param] for param in params]:
            self._cut_smallest(competitors, self.pattern.count(sparsity, sum(p.numel() for p in competitors)))
        self._freeze_zeros()

    def _freeze_zeros(self) -> None:
        for group in self.optimizer.param_groups:
            selected = self._selected(group)
            if len(selected) == len(group["params"]):
                group["freeze_zeros"] = True
                continue
            for param in selected:  # the others' zeros, such as those of new biases, must stay free
                self.optimizer.state[param]["lp_freeze_zeros"] = True

    def _finish(self) -> None:
        self.cut(self.ramp.target)
        for group in self.optimizer.param_groups:
            group.pop("pattern", None)
        for param in self.params.values():
            for name in _PLAN:
                self.optimizer.state[param].pop(name, None)

    def _cut_smallest(self, params: list[Tensor], count: int) -> None:
        """Set exactly the `count` smallest weights to zero; among equals the first ones go."""
        if count == 0:
            return
        threshold, below = kth_smallest(lambda: (self._size(param) for param in params), count)
        spare = count - below
        for param in params:
            size = self._size(param).to(torch.float32).contiguous()
            gone = size < threshold
            equal = (size == threshold).view(-1).nonzero().view(-1)[:spare]
            spare -= len(equal)
            gone.view(-1)[equal] = True
            param.masked_fill_(gone, 0.0)

    def _size(self, param: Tensor) -> Tensor:
        """`r`, what the plan ranks and the decay acts on: a new tensor, shaped like `param`."""
        state = self.optimizer.state[param]
        size = param.detach().abs().to(torch.promote_types(param.dtype, torch.float32))
        if "lp_row" in state:
            size.mul_(state["lp_row"]).mul_(state["lp_col"])
        return size if self.pattern.spec is None else structured_size(size, self.pattern.spec, self._dims[param])

    def _importance_from_adam(self) -> None:
        """Factor AdamW's second moment, the expected squared gradient, into rows and columns.

        ``h = sqrt(row mean * column mean) / mean`` estimates the root of the second moment from far fewer numbers
        than it has, as Adafactor does (arXiv 1804.04235); ``(|w| * h) ** 2`` is then the optimal brain damage
        saliency of a weight with the empirical Fisher for the curvature.
        """
        moments = {p: self.optimizer.state[p].get("exp_avg_sq") for p in self.params.values()}
        means = {param: moment.mean() for param, moment in moments.items() if moment is not None}
        for param, unit in self._units(means).items():
            moment, mean, state = moments[param], means[param], self.optimizer.state[param]
            state["lp_row"] = (moment.mean(1, keepdim=True) / unit).sqrt_()
            state["lp_col"] = (moment.mean(0, keepdim=True) / mean).sqrt_()

    def _importance_from_activations(self) -> None:
        """``h`` is the root mean square of a weight's input feature, as in Wanda (arXiv 2306.11695)."""
        squares = {}
        for param in self.params.values():
            state = self.optimizer.state[param]
            if "lp_feature_sq" in state:
                squares[param] = state.pop("lp_feature_sq") / state.pop("lp_feature_count")
        for param, unit in self._units({param: square.mean() for param, square in squares.items()}).items():
            feature = (squares[param] / unit).sqrt_().to(param.dtype)
            rows, columns = feature[:, None], feature.new_ones(1, param.shape[1])
            if self._dims[param] == 1:
                rows, columns = feature.new_ones(param.shape[0], 1), feature[None]
            self.optimizer.state[param].update(lp_row=rows, lp_col=columns)

    def _units(self, means: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """What mean square of ``h`` counts as 1: each tensor's own, or globally that of all selected weights.

        Without the tensors whose mean is zero: nothing has been seen of them yet, so they go by their magnitude.
        """
        seen = {param: mean for param, mean in means.items() if mean > 0}
        if self.config.scope == "layer":
            return seen
        total = sum(mean * param.numel() for param, mean in seen.items())
        return dict.fromkeys(seen, total / max(1, sum(param.numel() for param in seen)))

    def _selected(self, group: dict) -> list[Tensor]:
        return [param for param in group["params"] if id(param) in self._ids]

    def _numel(self) -> int:
        return sum(param.numel() for param in self.params.values())
