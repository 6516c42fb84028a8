"""When the decay acts, and how it changes in the course of a run."""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .patterns import SemiStructured, parse_pattern


if TYPE_CHECKING:  # it checks its pattern with this room
    from ..config import LpDecayConfig


DENSE, DECAY, SETTLE = "dense", "decay", "settle"
MIN_RAMP_STEPS = 10
# The ramp's default length with n:m, and where it ends otherwise, as fractions of all steps.
EARLY_RAMP, RAMP_END = 0.1, 0.7
# AdamW's second moment and the activations say little before a few batches have been seen.
MIN_IMPORTANCE_STEPS = 5
# With more steps than these, several are computed in one.
_FEW_STEPS = 200
# Halvings after which a weight counts as pruned: from there it collapses to zero.
_COLLAPSE = 10


@dataclass(frozen=True)
class Ramp:
    """The schedule of a run that is driven to a target, in optimizer steps.

    Args:
        start (`int`): Steps taken before the first plan; the dense phase.
        end (`int`): Steps taken when the target is cut exactly; the settle phase follows.
        plans (`int`): How many plans are made on the way, at equal distances.
        target (`float`): Sparsity at the end.
    """

    start: int
    end: int
    plans: int
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
        start = round(config.ramp_start * total_steps)
        if not config.calibration_batches:
            start = max(start, warmup_steps, 0 if config.importance == "magnitude" else MIN_IMPORTANCE_STEPS)
        end = round((RAMP_END if config.ramp_end is None else config.ramp_end) * total_steps)
        if config.ramp_end is None and isinstance(parse_pattern(config.pattern), SemiStructured):
            end = min(end, max(round((config.ramp_start + EARLY_RAMP) * total_steps), start + MIN_RAMP_STEPS))
        if end - start < MIN_RAMP_STEPS:
            raise ValueError(
                f"The ramp would have {max(end - start, 0)} optimizer steps, from step {start} to {end} of"
                f" {total_steps}, and needs {MIN_RAMP_STEPS}: train for more steps, warm up for fewer (now"
                f" {warmup_steps}), or move ramp_start={config.ramp_start} and ramp_end={end / total_steps:g} apart."
            )
        return cls(start, end, min(config.num_plans, end - start), config.target_sparsity)

    def phase(self, step: int) -> str:
        """The phase after `step` optimizer steps."""
        if step < self.start:
            return DENSE
        return DECAY if step < self.end else SETTLE

    def progress(self, step: int) -> float:
        """The share of the ramp that is done after `step` optimizer steps, from 0 to 1."""
        return min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)

    def sparsity(self, step: int) -> float:
        """The scheduled sparsity after `step` optimizer steps: cubic (Zhu and Gupta, arXiv 1710.01878)."""
        return self.target * cubic(self.progress(step))

    def next_plan(self, step: int) -> int | None:
        """The step of the plan (or cut) after the one at `step`, or `None` if nothing is planned at `step`."""
        return self.following(step) if step == self.start or self.following(step - 1) == step else None

    def following(self, step: int) -> int | None:
        """The step of the next plan (or cut) after `step` steps, or `None` outside of the ramp."""
        if not self.start <= step < self.end:
            return None
        length = self.end - self.start
        number = -(-(step + 1 - self.start) * self.plans // length)
        return self.start + number * length // self.plans


def cubic(progress: float) -> float:
    """``1 - (1 - progress) ** 3``: fast at first, while many weights are redundant."""
    return 1.0 - (1.0 - progress) ** 3


def norm(config: "LpDecayConfig", progress: float) -> float:
    """The norm in force: from `p_start` to `p` in a straight line over the ramp."""
    if config.p_start is None:
        return config.p
    return config.p_start + progress * (config.p - config.p_start)


@functools.lru_cache(maxsize=16)  # groups mostly ask for the same one, and with ZeRO each weight has its own group
def strength(p: float, rates: tuple[float, ...]) -> float:
    """The strength that decays weights to zero within the given steps.

    Under decay alone ``x ** (2 - p)`` falls by ``(2 - p) * lr * lambda`` in a step, which makes
    ``lambda = q ** (2 - p) / ((2 - p) * A)`` with ``A`` the summed learning rate: so it is for many small steps. A few
    large ones lag behind, as the rule divides by what the size was before.

    Args:
        p (`float`): The norm, below 2.
        rates (`tuple[float, ...]`): The learning rate of each optimizer step.

    Returns:
        `float`: The smallest ``lambda`` with which a weight of size 1 is less than 1 / 1024 afterwards; from there it
            collapses. For a weight of size ``q`` it is ``q ** (2 - p)`` times as much. 0 if all rates are.
    """
    total, few = sum(rates), min(len(rates), _FEW_STEPS)
    if total <= 0:
        return 0.0
    edges = [i * len(rates) // few for i in range(few + 1)]
    shares = [sum(rates[first:last]) / total for first, last in itertools.pairwise(edges)]
    low, high = -40.0, 12.0  # log2 of the strength, if the rates add up to 1
    for _ in range(40):
        middle = (low + high) / 2
        size = 1.0
        for share in shares:
            size = decayed(size, p, 2.0**middle * share)
        if size > 2.0**-_COLLAPSE:
            low = middle
        else:
            high = middle
    return 2.0**high / total


def decayed(size: float, p: float, decay: float) -> float:
    """A size after one step of nothing but decay, with `decay` the learning rate times lambda."""
    if size <= 0 or decay <= 0:
        return size
    log2_size = math.log2(size)
    exponent = math.log2(decay) + (p - 2) * log2_size
    log2_size -= math.log2(1.0 + 2.0**exponent) if exponent < 60 else exponent
    return 2.0**log2_size if log2_size > -1000 else 0.0


def trim_threshold(planned: float, edge: float) -> float:
    """The trimming threshold in the course of a plan: it follows the decaying weights down.

    At first the decay acts on all weights below the planned threshold. Those weights soon are much smaller, so that a
    weight which falls to the planned threshold later is another one and must not be pruned. The threshold in force is
    half way between the planned one and the largest decaying weight, on a logarithmic scale.

    Args:
        planned (`float`): The threshold when the plan was made.
        edge (`float`): What a weight of that score has decayed to by now, under decay alone.

    Returns:
        `float`: The threshold in force: from `planned` down to a 32nd of it.
    """
    return planned * max(edge / planned, 2.0**-_COLLAPSE) ** 0.5 if planned > 0 else planned


class PlainSchedule:
    """Schedules the norm and the strength of a decay without a target.

    Args:
        config (`LpDecayConfig`): With an `lp_lambda`.
        params (`dict[str, torch.Tensor]`): The selected parameters by name.
        optimizer (`LpAdamW`): Holds them, best in groups that hold nothing else.
        total_steps (`int`): Optimizer steps in the run.
    """

    def __init__(
        self,
        config: "LpDecayConfig",
        params: dict[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
        total_steps: int,
    ):
        self.config = config
        self._ids = {id(param) for param in params.values()}
        self._optimizer = optimizer
        end = RAMP_END if config.ramp_end is None else config.ramp_end
        self._start, self._end = (config.ramp_start * total_steps, end * total_steps)

    def after_step(self, step: int) -> None:
        """Set norm and strength for the step after `step` optimizer steps."""
        length = self._end - self._start  # that of a constant schedule has no effect
        progress = min(max((step - self._start) / length, 0.0), 1.0) if length > 0 else 1.0
        shares = {"constant": 1.0, "linear": progress, "cubic": cubic(progress)}
        lp_lambda = self.config.lp_lambda * shares[self.config.lp_lambda_schedule]
        for group in self._optimizer.param_groups:
            selected = [param for param in group["params"] if id(param) in self._ids]
            if selected:
                group["p"] = norm(self.config, progress)
            if len(selected) == len(group["params"]):
                group["lp_lambda"] = lp_lambda
                continue
            for param in selected:
                self._optimizer.state[param]["lp_lambda"] = lp_lambda
