"""The mean of the weights over the last steps of a run, with which the model ends."""

import torch
from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(__name__)


class WeightAverage:
    """Averages all weights that an optimizer steps, from one step to the end (arXiv 1803.05407, without its schedule).

    Zeros that are frozen stay zero. The mean is float32 (float64 for float64 weights) and kept in the optimizer's state
    as `lp_mean`, so that a checkpoint holds it.

    Args:
        optimizer (`torch.optim.Optimizer`): Steps the weights.
        first (`int`): The mean begins with the weights after the step that follows this one.
        last (`int`): After this step, the last of the run, the weights are replaced by their mean.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, first: int, last: int):
        self._optimizer, self._first, self._last = optimizer, first, last

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Take the weights into the mean; after the last step put it in their place.

        Args:
            step (`int`): Optimizer steps taken so far.
        """
        if not self._first < step <= self._last:
            return
        state, params = self._optimizer.state, self._stepped()
        if step == self._first + 1:
            for param in params:
                state[param]["lp_mean"] = param.detach().to(torch.promote_types(param.dtype, torch.float32), copy=True)
        for param in params:
            if (mean := state[param].get("lp_mean")) is not None:
                mean.lerp_(param.to(mean.dtype), 1.0 / (step - self._first))
            if mean is not None and step == self._last:
                param.copy_(state[param].pop("lp_mean"))

    def finish(self, step: int) -> None:
        """Drop the mean of a run that has ended after fewer steps."""
        if step < self._last:
            for param in self._stepped():
                self._optimizer.state[param].pop("lp_mean", None)
            logger.warning_once(
                f"Training stopped after step {step} of {self._last}: the weights are those of that step, not a mean."
            )

    def _stepped(self) -> list[Tensor]:
        """The parameters with a state. Others were not stepped yet, or their optimizer has none for any of them: to one
        without a state an optimizer might not give its own any more."""
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        return [param for param in params if self._optimizer.state.get(param)] or params


def average_of(
    optimizer: torch.optim.Optimizer, share: float, total_steps: int, ramp_end: int = 0
) -> WeightAverage | None:
    """The average that `average_weights` asks for, if it does.

    Args:
        optimizer (`torch.optim.Optimizer`): Steps the weights.
        share (`float`): Fraction of all steps, see [`~hf_lpdecay.LpDecayConfig`].
        total_steps (`int`): Optimizer steps in the run.
        ramp_end (`int`, *optional*, defaults to 0): The step of the last cut, before which the mean does not begin.
    """
    steps = round(share * total_steps)
    return WeightAverage(optimizer, max(total_steps - steps, ramp_end), total_steps) if steps else None
