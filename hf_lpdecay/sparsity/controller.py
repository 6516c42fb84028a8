"""Drives the decay to a target: how strongly it acts, on what, and the exact cut at the end."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..optim.functional import structured_size
from ..optim.pieces import local
from .compensation import Compensation
from .importance import importance_from_activations, importance_from_adam, importance_from_calibration
from .patterns import parse_pattern
from .quantiles import histogram, kth_smallest, lower_edges
from .schedule import MIN_IMPORTANCE_STEPS, Ramp, between, decayed, norm, strength
from .sharding import before_mine, groups_of, is_sharded, placed_like, summed, summed_rows
from .units import Units


if TYPE_CHECKING:  # it checks its pattern with this room
    from ..config import LpDecayConfig


_PLAN = (
    *("lp_lambda", "lp_threshold", "lp_planned", "lp_edge"),
    *("lp_row", "lp_col", "lp_size", "lp_dim", "lp_rows", "lp_row_sq", "lp_col_sq"),
)


class SparsityController:
    """Drives selected parameters of an [`~hf_lpdecay.LpAdamW`] to a target sparsity.

    Every few steps it plans, for each tensor: how many weights are due to be zero at the next plan, the size ``q``
    below which they lie, and the strength that takes a weight of that size to zero by then. Under decay alone
    ``r ** (2 - p)`` falls by ``(2 - p) * lambda * lr`` in a step, so with ``A`` the learning rate summed until then,
    ``lambda = q ** (2 - p) / ((2 - p) * A)``; for a few large steps [`~.schedule.strength`] has the exact number. If
    `trim` is set, all but the weights below ``q`` are exempt; until the next plan the threshold sinks with them, so
    that no other weight gets into their number. From the first plan on, what is zero stays zero. With `hard_cut` each
    plan cuts what is due by then, and nothing decays.

    The plan lives in the optimizer's state, and what has been done so far in the weights' own zeros, so that the
    optimizer's and the model's checkpoints hold everything that a resumed run needs.

    Args:
        config (`LpDecayConfig`): With a `target_sparsity`.
        params (`dict[str, torch.Tensor]`): The selected parameters by name.
        optimizer (`LpAdamW`): Holds them, best in groups that hold nothing else.
        ramp (`Ramp`): The schedule.
        input_dims (`dict[str, int]`, *optional*): For each parameter the dimension of the input features, if it is
            not 1 (as in GPT-2's `Conv1D`).
        units (`list[Units]`, *optional*): What is zero as one with the patterns `"neurons"` and `"heads"`; they
            consist of `params`.
        compensation (`Compensation`, *optional*): What lets the survivors make up for what becomes zero.

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
            if is_sharded(param) and self.pattern.rows(self._dims[param]) > 1:
                raise ValueError(
                    f"pattern={config.pattern!r} needs {self.pattern.rows(self._dims[param])} rows of {name} in one"
                    " process, but its rows are spread over several: train with DDP, or take another pattern."
                )
        # Who is ranked together: all, or each tensor or the units of each feed-forward, attention or adapter.
        competitors: list[Tensor | Units] = self._units or list(params.values())
        self._pools = [competitors] if config.scope == "global" else [[one] for one in competitors]

    @torch.no_grad()
    def before_step(self) -> None:
        """Tell the optimizer how large each unit is now, which no weight shows by itself."""
        for units in self._units:
            if any("lp_lambda" in self.optimizer.state[param] for param in units.params):
                for param, size in units.spread(units.size(self._size)):
                    self.optimizer.state[param]["lp_size"] = placed_like(size, param)

    @torch.no_grad()
    def after_step(self, step: int, learning_rates: Callable[[int, int], list[list[float]]]) -> None:
        """Plan or cut, if it is time.

        Args:
            step (`int`): Optimizer steps taken so far.
            learning_rates (`Callable[[int, int], list[list[float]]]`): For each of the optimizer's groups the learning
                rates from one step to another, which is not included, where 0 is the next step.
        """
        following = self.ramp.next_plan(step)
        due = following is not None or step == self.ramp.end
        if self.ramp.start < step <= self.ramp.end:
            self._follow(learning_rates(-1, 0), due)
        if self._compensation is not None and due:
            self._compensation.gather()
        if step == self.ramp.end:
            self._finish()
        elif following is not None:
            self._weigh(step)
            if self.config.hard_cut:
                self.cut(self.ramp.sparsity(step))
            else:
                self._plan(step, following, learning_rates(0, following - step))
        self._listen(step)

    @torch.no_grad()
    def resume(self, step: int, learning_rates: Callable[[int, int], list[list[float]]]) -> None:
        """Plan anew where a checkpoint does not hold the plan: that of sharded parameters.

        Nor does it hold what compensation has heard: it moves nothing again now, and starts to listen anew.

        Args:
            step (`int`): Optimizer steps taken before.
            learning_rates (`Callable[[int, int], list[list[float]]]`): See [`after_step`].

        Raises:
            ValueError: If the importance was gathered in a part of the run that lies behind.
        """
        self._listen(step)
        if not any(is_sharded(param) for param in self.params.values()):
            return
        if self.config.importance == "activation" and step > self.ramp.start:
            raise ValueError(
                f"importance='activation' was gathered before step {self.ramp.start}, and a checkpoint of sharded"
                " parameters does not hold it: start anew, or train with importance='adam' or with DDP."
            )
        for param in self.params.values():
            state = self.optimizer.state[param]
            for name in [name for name in state if name.startswith("lp_")]:
                del state[name]
        following = self.ramp.following(step)
        if following is not None:
            self._weigh(step)
            if not self.config.hard_cut:
                self._plan(step, following, learning_rates(0, following - step))

    def _listen(self, step: int) -> None:
        """Look at the features in the last steps before each plan, no longer."""
        if self._compensation is not None:
            due = self.ramp.start if step < self.ramp.start else self.ramp.following(step)
            self._compensation.listening = due is not None and due - step <= MIN_IMPORTANCE_STEPS

    def lp_lambda(self) -> float:
        """The strength that is planned now, averaged over the selected weights."""
        state = self.optimizer.state
        sizes = {param: self._numel(param) for param in self.params.values()}
        return sum(state[param].get("lp_lambda", 0.0) * size for param, size in sizes.items()) / sum(sizes.values())

    def _weigh(self, step: int) -> None:
        """Bring the importance up to date."""
        state, together = self.optimizer.state, self.config.scope == "global" or bool(self._units)
        if self.config.importance == "adam":
            early = self.config.calibration_batches and step < MIN_IMPORTANCE_STEPS
            weigh = importance_from_calibration if early else importance_from_adam
            weigh(list(self.params.values()), state, together)
        elif self.config.importance == "activation" and step == self.ramp.start:
            importance_from_activations(self._dims, state, together)

    def _plan(self, step: int, following: int, learning_rates: list[list[float]]) -> None:
        sparsity, p = self.ramp.sparsity(following), norm(self.config, self.ramp.progress(step))
        counts = torch.stack([sum(histogram(size) for size in self._sizes(pool)) for pool in self._pools])
        counts = summed_rows(counts, [self._groups(pool) for pool in self._pools])
        edges = lower_edges(counts, [max(1, self._count(pool, sparsity)) for pool in self._pools])
        thresholds = {param: edge for pool, edge in zip(self._pools, edges) for param in self._params_of(pool)}
        self._freeze_zeros()
        if self._compensation is not None:
            for pool, edge in zip(self._pools, edges):
                for param, gone, before in self._going(pool, (size < edge for size in self._sizes(pool))):
                    self._compensation.apply(param, gone, before, gradually=True)
        for group, rates in zip(self.optimizer.param_groups, learning_rates):
            if self.config.trim:
                lp_lambda = strength(p, tuple(rates))
            else:  # the survivors shrink as well: there the strength stays that of many small steps
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

    def _follow(self, learning_rates: list[list[float]], due: bool) -> None:
        """Follow what is due to where the last step took it: compensation moves as far as it has decayed, and the
        threshold sinks to where nothing but it is below. What else comes near, by learning or by compensation, stays.
        """
        for group, (rate,) in zip(self.optimizer.param_groups, learning_rates):
            for param in self._selected(group):
                state = self.optimizer.state[param]
                if "lp_planned" not in state:
                    continue
                planned, before, p = state["lp_planned"], state["lp_edge"], group["p"]
                state["lp_edge"] = edge = decayed(before, p, rate * state["lp_lambda"])
                if self._compensation is not None and planned > 0:
                    # As r ** (2 - p) does; the rest now, if the next plan is.
                    left = (before / planned) ** (2 - p)
                    self._compensation.advance(param, left if due else left - (edge / planned) ** (2 - p))
                if self.config.trim and self.config.s_rate == 1:  # otherwise it lags behind
                    state["lp_threshold"] = between(planned, edge)

    def cut(self, sparsity: float) -> None:
        """Set exactly the smallest weights to zero, as many as `sparsity` says, and freeze all zeros.

        Args:
            sparsity (`float`): Fraction of each tensor, of all of them together with `scope="global"`, or of the units
                of each feed-forward or attention.
        """
        for pool in self._pools:
            count = self._count(pool, sparsity)
            if count == 0:
                continue
            for param, gone, before in self._going(pool, self._smallest(pool, count)):
                if self._compensation is not None:
                    self._compensation.apply(param, gone, before)
                local(param).masked_fill_(gone, 0.0)
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
        if self._compensation is not None:
            self._compensation.finish()
        for group in self.optimizer.param_groups:
            group.pop("pattern", None)
        for param in self.params.values():
            for name in _PLAN:
                self.optimizer.state[param].pop(name, None)

    def _count(self, pool: list[Tensor | Units], sparsity: float) -> int:
        if self._units:
            return round(sparsity * sum(units.count for units in pool))
        return self.pattern.count(sparsity, sum(map(self._numel, pool)))

    def _params_of(self, pool: list[Tensor | Units]) -> list[Tensor]:
        return [param for units in pool for param in units.params] if self._units else pool

    def _going(self, pool: list[Tensor | Units], masks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each weight of a pool, which of its elements go with the weights or units that do, and which of them were due
        at the last plan already: what is here of it."""
        for one, mask, size in zip(pool, masks, self._sizes(pool)):
            first = one.params[0] if isinstance(one, Units) else one
            before = size < self.optimizer.state[first].get("lp_threshold", 0.0)
            if isinstance(one, Units):
                for (param, gone), (_, due) in zip(one.spread(mask.float()), one.spread(before.float())):
                    yield param, local(placed_like(gone, param)) > 0, local(placed_like(due, param)) > 0
            else:
                yield one, mask, before

    def _sizes(self, pool: list[Tensor | Units]) -> Iterator[Tensor]:
        """`r` of all that are ranked together, one tensor at a time; of weights, this process's pieces."""
        for one in pool:
            size = one.size(self._size) if isinstance(one, Units) else local(self._size(one))
            yield size.to(torch.float32)

    def _size(self, param: Tensor) -> Tensor:
        """`r`, what the plan ranks and the decay acts on: a new tensor, shaped and placed like `param`."""
        state = self.optimizer.state[param]
        size = param.detach().abs().to(torch.promote_types(param.dtype, torch.float32))
        if "lp_row" in state:
            size.mul_(state["lp_row"]).mul_(state["lp_col"])
        if self.pattern.spec is None:
            return size
        return structured_size(local(size), self.pattern.spec, self._dims[param])

    def _smallest(self, pool: list[Tensor | Units], count: int) -> Iterator[Tensor]:
        """Masks of exactly the `count` smallest of a pool, at least one; among equals the first ones are taken."""
        groups = self._groups(pool)
        threshold, below = kth_smallest(lambda: self._sizes(pool), lambda counts: summed(counts, groups), count)
        spare = count - below
        equals = torch.stack([(size == threshold).sum() for size in self._sizes(pool)])
        before, total = before_mine(equals, groups)
        # Tensor by tensor, and piece by piece within each.
        first = (total.cumsum(0) - total + before).tolist()
        for size, skip in zip(self._sizes(pool), first):
            size = size.contiguous()
            gone = size < threshold
            equal = (size == threshold).view(-1).nonzero().view(-1)[: max(0, spare - skip)]
            gone.view(-1)[equal] = True
            yield gone

    def _numel(self, param: Tensor) -> int:
        """Of the whole parameter, whatever part of it is here."""
        return param.numel()

    def _groups(self, pool: list[Tensor | Units]) -> list[torch.distributed.ProcessGroup]:
        """The processes that count their own pieces; the sizes of units are everywhere the same."""
        return [] if self._units else groups_of(pool[0])

    def _selected(self, group: dict) -> list[Tensor]:
        return [param for param in group["params"] if id(param) in self._ids]
