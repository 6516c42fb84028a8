"""Drives the decay to a target sparsity: strength, threshold and pruning masks, and the exact cut at the end."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..optim.functional import structured_size
from ..optim.pieces import local
from .compensation import Compensation
from .importance import FROM_HOOKS, importance_from_activations, importance_from_adam, importance_from_calibration
from .patterns import parse_pattern
from .quantiles import histogram, kth_smallest, lower_edges
from .schedule import MIN_IMPORTANCE_STEPS, Ramp, decayed, norm, strength, trim_threshold
from .sharding import before_mine, groups_of, is_sharded, placed_like, summed, summed_rows
from .units import Units


if TYPE_CHECKING:  # it checks its pattern with this room
    from ..config import LpDecayConfig


_PLAN = (
    *("lp_lambda", "lp_threshold", "lp_planned", "lp_edge"),
    *("lp_row", "lp_col", "lp_size", "lp_dim", "lp_rows", "lp_row_sq", "lp_col_sq", "lp_unit"),
    *("lp_feature_sq", "lp_feature_count", "lp_output_sq"),
)


class SparsityController:
    """Drives selected parameters of an [`~hf_lpdecay.LpAdamW`] to a target sparsity.

    Every few steps it makes a plan for each tensor: how many weights the schedule prunes by the next plan, the
    threshold ``q`` of the score ``r`` (``|w|`` times the importance) below which they lie, and the strength that decays
    a weight of score ``q`` to zero by then. Under decay alone ``r ** (2 - p)`` falls by ``(2 - p) * lambda * lr`` in a
    step, so with ``A`` the summed learning rate, ``lambda = q ** (2 - p) / ((2 - p) * A)``; for a few large steps
    [`~.schedule.strength`] is exact. With `trim`, weights of a score of ``q`` and above are exempt from the decay;
    until the next plan the threshold follows the decaying weights down, so that no other weight falls below it. From
    the first plan on, zeros stay zero. With `hard_cut` each plan sets the weights below ``q`` to zero instead.

    Experts that share a 3-D parameter lose equally many neurons each: a plan divides the scores of an expert's neurons
    by that expert's own ``q`` (`lp_unit`).

    The plan is kept in the optimizer's state, and the pruning mask in the weights' own zeros, so that the optimizer's
    and the model's checkpoints hold everything that a resumed run needs.

    Args:
        config (`LpDecayConfig`): With a `target_sparsity`.
        params (`dict[str, torch.Tensor]`): The selected parameters by name.
        optimizer (`LpAdamW`): Holds them, best in groups that hold nothing else.
        ramp (`Ramp`): The schedule.
        input_dims (`dict[str, int]`, *optional*): For each parameter the dimension of the input features, if it is
            not 1 (as in GPT-2's `Conv1D`).
        units (`list[Units]`, *optional*): The neurons, heads or ranks that are pruned as a whole; they consist of
            `params`.
        compensation (`Compensation`, *optional*): Updates the remaining weights while others are pruned.

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
        units: list[Units] | None = None,
        compensation: Compensation | None = None,
    ):
        self.config = config
        self.params = params
        self.optimizer = optimizer
        self.ramp = ramp
        self.pattern = parse_pattern(config.pattern)
        self.pattern.check_all(params, input_dims or {})
        self._units = units or []
        self._compensation = compensation
        self._dims = {param: (input_dims or {}).get(name, 1) for name, param in params.items()}
        self._ids = {id(param) for param in params.values()}
        for name, param in params.items():
            if is_sharded(param) and param.dim() == 2 and self.pattern.rows(self._dims[param]) > 1:
                raise ValueError(
                    f"pattern={config.pattern!r} needs {self.pattern.rows(self._dims[param])} rows of {name} in one"
                    " process, but its rows are spread over several: train with DDP, or take another pattern."
                )
        # What is ranked together: everything, or each tensor or the units of each feed-forward, attention or adapter.
        ranked: list[Tensor | Units] = self._units or list(params.values())
        self._pools = [ranked] if config.scope == "global" else [[one] for one in ranked]

    @torch.no_grad()
    def before_step(self) -> None:
        """Give the optimizer the score of each unit, which a weight alone does not have."""
        for units in self._units:
            if any("lp_lambda" in self.optimizer.state[param] for param in units.params):
                for param, size in units.spread(self._unit_scores(units)):
                    self.optimizer.state[param]["lp_size"] = placed_like(size, param)

    @torch.no_grad()
    def after_step(self, step: int, learning_rates: Callable[[int, int], list[list[float]]]) -> None:
        """Plan or cut, if the schedule has a plan at this step.

        Args:
            step (`int`): Optimizer steps taken so far.
            learning_rates (`Callable[[int, int], list[list[float]]]`): For each of the optimizer's groups the learning
                rates from one step to another (exclusive), where 0 is the next step.
        """
        following = self.ramp.next_plan(step)
        planning = following is not None or step == self.ramp.end
        if self.ramp.start < step <= self.ramp.end:
            self._track_decay(learning_rates(-1, 0), planning)
        if self._compensation is not None and planning:
            self._compensation.average()
        if step == self.ramp.end:
            self._finish()
        elif following is not None:
            self._update_importance(step)
            if self.config.hard_cut:
                self.cut(self.ramp.sparsity(step))
            else:
                self._plan(step, following, learning_rates(0, following - step))
        self._set_collecting(step)

    @torch.no_grad()
    def resume(self, step: int, learning_rates: Callable[[int, int], list[list[float]]]) -> None:
        """Plan anew where a checkpoint does not hold the plan: that of sharded parameters.

        Nor does it hold the Hessians: they are collected anew, and there is no update before the next plan.

        Args:
            step (`int`): Optimizer steps taken before.
            learning_rates (`Callable[[int, int], list[list[float]]]`): See [`after_step`].

        Raises:
            ValueError: If the importance was collected earlier in the run.
        """
        self._set_collecting(step)
        if not any(is_sharded(param) for param in self.params.values()):
            return
        if self.config.importance in FROM_HOOKS and step > self.ramp.start:
            raise ValueError(
                f"importance={self.config.importance!r} was collected before step {self.ramp.start}, and a checkpoint"
                " of sharded parameters does not hold it: start a new run, or train with importance='adam' or with DDP."
            )
        for param in self.params.values():
            state = self.optimizer.state[param]
            for name in [name for name in state if name.startswith("lp_")]:
                del state[name]
        following = self.ramp.following(step)
        if following is not None:
            self._update_importance(step)
            if not self.config.hard_cut:
                self._plan(step, following, learning_rates(0, following - step))

    def _set_collecting(self, step: int) -> None:
        """Collect the Hessians in the last steps before each plan only."""
        if self._compensation is not None:
            plan = self.ramp.start if step < self.ramp.start else self.ramp.following(step)
            self._compensation.collecting = plan is not None and plan - step <= MIN_IMPORTANCE_STEPS

    def lp_lambda(self) -> float:
        """The planned strength, averaged over the selected weights."""
        state = self.optimizer.state
        sizes = {param: self._numel(param) for param in self.params.values()}
        return sum(state[param].get("lp_lambda", 0.0) * size for param, size in sizes.items()) / sum(sizes.values())

    def _update_importance(self, step: int) -> None:
        state, together = self.optimizer.state, self.config.scope == "global" or bool(self._units)
        if self.config.importance == "adam":
            early = self.config.calibration_batches and step < MIN_IMPORTANCE_STEPS
            update = importance_from_calibration if early else importance_from_adam
            update(list(self.params.values()), state, together)
        elif self.config.importance == "fisher" or (self.config.importance == "activation" and step == self.ramp.start):
            importance_from_activations(self._dims, state, together)

    def _plan(self, step: int, following: int, learning_rates: list[list[float]]) -> None:
        sparsity, p = self.ramp.sparsity(following), norm(self.config, self.ramp.progress(step))
        measures = {units: self._measure(units, sparsity) for units in self._units if units.experts}
        counts = torch.stack([sum(histogram(score) for score in self._scores(pool, measures)) for pool in self._pools])
        counts = summed_rows(counts, [self._process_groups(pool) for pool in self._pools])
        edges = lower_edges(counts, [max(1, self._count(pool, sparsity)) for pool in self._pools])
        thresholds = {param: edge for pool, edge in zip(self._pools, edges) for param in self._params_of(pool)}
        self.freeze_zeros()
        if self._compensation is not None:
            for pool, edge in zip(self._pools, edges):
                masks = (score < edge for score in self._scores(pool, measures))
                for param, pruned, already_pruned in self._pruning_masks(pool, masks):
                    self._compensation.apply(param, pruned, already_pruned, gradually=True)
        for units, measure in measures.items():
            self.optimizer.state[units.params[0]]["lp_unit"] = measure
        for group, rates in zip(self.optimizer.param_groups, learning_rates):
            if self.config.trim:
                lp_lambda = strength(p, tuple(rates))
            else:  # all weights shrink: there the strength stays that of many small steps
                lp_lambda = 1.0 / ((2 - p) * sum(rates)) if sum(rates) > 0 else 0.0
            for param in self._selected(group):
                group["p"] = p
                state, threshold = self.optimizer.state[param], thresholds[param]
                if self.pattern.spec is not None:
                    group["pattern"] = self.pattern.spec
                    state["lp_dim"] = self._dims[param]
                    state["lp_rows"] = self.pattern.rows(self._dims[param])
                state["lp_lambda"] = threshold ** (2 - p) * lp_lambda
                state["lp_planned"] = state["lp_edge"] = threshold
                if self.config.trim:
                    state["lp_threshold"] = threshold

    def _track_decay(self, learning_rates: list[list[float]], planning: bool) -> None:
        """Track how far the last step has decayed the weights below the threshold: apply the same share of the
        compensation, and lower the threshold, so that weights which come near it otherwise are not pruned."""
        for group, (rate,) in zip(self.optimizer.param_groups, learning_rates):
            for param in self._selected(group):
                state = self.optimizer.state[param]
                if "lp_planned" not in state:
                    continue
                planned, last, p = state["lp_planned"], state["lp_edge"], group["p"]
                state["lp_edge"] = edge = decayed(last, p, rate * state["lp_lambda"])
                if self._compensation is not None and planned > 0:
                    # In proportion to r ** (2 - p); the rest of it at the next plan.
                    left = (last / planned) ** (2 - p)
                    self._compensation.advance(param, left if planning else left - (edge / planned) ** (2 - p))
                if self.config.trim and self.config.s_rate == 1:  # otherwise the decay lags behind
                    state["lp_threshold"] = trim_threshold(planned, edge)

    def cut(self, sparsity: float, last: bool = False) -> None:
        """Set exactly the weights of the smallest scores to zero, and freeze all zeros.

        Args:
            sparsity (`float`): Fraction of zeros in each tensor, in all of them together with `scope="global"`, or of
                the units of each feed-forward or attention.
            last (`bool`, *optional*, defaults to `False`): Free the Hessian of each layer when it is done.
        """
        for pool in self._pools:
            count = self._count(pool, sparsity)
            if count == 0:
                continue
            for param, pruned, already_pruned in self._pruning_masks(pool, self._smallest(pool, count)):
                if self._compensation is not None:
                    pruned = self._compensation.apply(param, pruned, already_pruned)
                    if last:
                        self._compensation.free(param)
                local(param).masked_fill_(pruned, 0.0)
        self.freeze_zeros()

    def freeze_zeros(self) -> None:
        """Keep all zeros of the selected weights at zero from now on."""
        for group in self.optimizer.param_groups:
            selected = self._selected(group)
            if len(selected) == len(group["params"]):
                group["freeze_zeros"] = True
                continue
            for param in selected:  # the others' zeros, such as those of new biases, must stay free
                self.optimizer.state[param]["lp_freeze_zeros"] = True

    def _finish(self) -> None:
        self.cut(self.ramp.target, last=True)
        if self._compensation is not None:
            self._compensation.finish()
        for group in self.optimizer.param_groups:
            group.pop("pattern", None)
        for param in self.params.values():
            for name in _PLAN:
                self.optimizer.state[param].pop(name, None)

    def _count(self, pool: list[Tensor | Units], sparsity: float) -> int:
        if self._units:
            return (pool[0].experts or 1) * round(sparsity * sum(units.count for units in pool))
        return self.pattern.count(sparsity, sum(map(self._numel, pool)))

    def _params_of(self, pool: list[Tensor | Units]) -> list[Tensor]:
        return [param for units in pool for param in units.params] if self._units else pool

    def _pruning_masks(
        self, pool: list[Tensor | Units], masks: Iterable[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each weight of a pool, its pruning mask, and that of the last plan: this process's part of them.

        Args:
            pool (`list[torch.Tensor | Units]`): What is ranked together.
            masks (`Iterable[torch.Tensor]`): Which weights or units of each are pruned.
        """
        for one, mask, score in zip(pool, masks, self._scores(pool)):
            first = one.params[0] if isinstance(one, Units) else one
            already = score < self.optimizer.state[first].get("lp_threshold", 0.0)
            if isinstance(one, Units):
                for (param, pruned), (_, earlier) in zip(one.spread(mask.float()), one.spread(already.float())):
                    yield param, local(placed_like(pruned, param)) > 0, local(placed_like(earlier, param)) > 0
            else:
                yield one, mask, already

    def _scores(self, pool: list[Tensor | Units], measures: dict[Units, Tensor] | None = None) -> Iterator[Tensor]:
        """The scores `r` of what is ranked together, one tensor at a time; of weights, this process's part."""
        for one in pool:
            units = isinstance(one, Units)
            yield (self._unit_scores(one, (measures or {}).get(one)) if units else local(self._score(one))).float()

    def _unit_scores(self, units: Units, measure: Tensor | None = None) -> Tensor:
        """The scores of units; those of experts by the measure given, or that of the last plan."""
        measure = self.optimizer.state[units.params[0]].get("lp_unit") if measure is None else measure
        score = units.score(self._score)
        return score if measure is None else score / measure

    def _measure(self, units: Units, sparsity: float) -> Tensor:
        """The score in each expert below which the next plan's neurons lie, shape (experts, 1)."""
        count = max(1, round(sparsity * units.count))
        smallest = units.score(self._score).float().kthvalue(count, dim=-1, keepdim=True).values
        return smallest.clamp_min_(torch.finfo(torch.float32).tiny)  # where so many are zero already

    def _score(self, param: Tensor) -> Tensor:
        """The scores `r` that the plan ranks and the decay acts on: a new tensor, shaped and placed like `param`."""
        state = self.optimizer.state[param]
        score = param.detach().abs().to(torch.promote_types(param.dtype, torch.float32))
        if "lp_row" in state:
            score.mul_(state["lp_row"]).mul_(state["lp_col"])
        if self.pattern.spec is None:
            return score
        return structured_size(local(score), self.pattern.spec, self._dims[param])

    def _smallest(self, pool: list[Tensor | Units], count: int) -> Iterator[Tensor]:
        """Masks of exactly the `count` smallest of a pool, at least one; among equals the first ones are taken."""
        if isinstance(pool[0], Units) and pool[0].experts:  # equally many of each
            (score,) = self._scores(pool)
            order = score.argsort(dim=-1, stable=True)[:, : count // len(score)]
            yield torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)
            return
        groups = self._process_groups(pool)
        threshold, below = kth_smallest(lambda: self._scores(pool), lambda counts: summed(counts, groups), count)
        spare = count - below
        equals = torch.stack([(score == threshold).sum() for score in self._scores(pool)])
        before, total = before_mine(equals, groups)
        # Tensor by tensor, and piece by piece within each.
        first = (total.cumsum(0) - total + before).tolist()
        for score, skip in zip(self._scores(pool), first):
            score = score.contiguous()
            pruned = score < threshold
            equal = (score == threshold).view(-1).nonzero().view(-1)[: max(0, spare - skip)]
            pruned.view(-1)[equal] = True
            yield pruned

    def _numel(self, param: Tensor) -> int:
        """Number of elements of the whole parameter, not only of this process's part."""
        return param.numel()

    def _process_groups(self, pool: list[Tensor | Units]) -> list[torch.distributed.ProcessGroup]:
        """The processes that count their own parts; the scores of units are the same in all of them."""
        return [] if self._units else groups_of(pool[0])

    def _selected(self, group: dict) -> list[Tensor]:
        return [param for param in group["params"] if id(param) in self._ids]
