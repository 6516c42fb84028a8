"""Which checkpoints may be the best: those of a model that has its target, since one from before it is denser."""

from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import TrainerState, TrainingArguments


class BestFromTarget:
    """Keeps evaluations before the ramp's end from counting for `metric_for_best_model`.

    So `load_best_model_at_end` and `save_strategy="best"` take a checkpoint from later, and an `EarlyStoppingCallback`
    neither counts nor stops before. Until then `TrainerState.best_metric` is `None` whenever an evaluation begins:
    early stopping takes that for an improvement, whether its callback is called before this one or after it. The
    `Trainer`, which compares next, finds no evaluation better, see [`_Uncounted`].

    Args:
        args (`TrainingArguments`): With `metric_for_best_model`.
        state (`TrainerState`): Of the run; its record of the best is changed in place.
        ramp_end (`int`): The step from which on evaluations count.
    """

    def __init__(self, args: TrainingArguments, state: TrainerState, ramp_end: int):
        name = args.metric_for_best_model
        self._metric = name if name.startswith("eval_") else f"eval_{name}"
        self._state = state
        self._ramp_end = ramp_end
        if self.waits or (state.best_global_step or ramp_end) < ramp_end:  # the latter in a checkpoint of another run
            self.forget()
        if self.waits and state.is_world_process_zero:
            tqdm.write(
                f"metric_for_best_model={name!r} counts from step {ramp_end} on, when the target is reached: no"
                " checkpoint from before is saved or loaded as the best, and early stopping waits until then."
            )

    @property
    def waits(self) -> bool:
        """Whether the ramp's end is still to come."""
        return self._state.global_step < self._ramp_end

    def forget(self) -> None:
        """Forget the best so far."""
        state = self._state
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_step_end(self) -> None:
        """Call after each step, before it is evaluated."""
        if self._state.global_step <= self._ramp_end:
            self.forget()

    def on_evaluate(self, metrics: dict[str, Any]) -> None:
        """Call with the metrics of an evaluation, before the `Trainer` looks at them."""
        if self.waits and self._metric in metrics:
            metrics[self._metric] = _Uncounted(metrics[self._metric])

    def on_save(self) -> None:
        """Call before the state is written: what the `Trainer` compared an evaluation with is infinite, which JSON does
        not have."""
        if self.waits:
            self.forget()


class _Uncounted(float):
    """A number that NumPy, with which the `Trainer` compares, finds neither less nor greater than another.

    It is an ordinary one to everybody else, such as a scheduler that waits for a plateau.
    """

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if ufunc in (np.less, np.greater):
            return False
        inputs = [float(value) if isinstance(value, _Uncounted) else value for value in inputs]
        return getattr(ufunc, method)(*inputs, **kwargs)
