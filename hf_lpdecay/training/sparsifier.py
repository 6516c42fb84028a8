"""`Sparsifier`: the p-norm decay in a training loop of one's own, without a `Trainer`."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import is_compiled_module
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..config import LpDecayConfig
from ..sparsity import SparsityDriver, participants
from .averaging import average_of
from .callbacks import forget_compiled, unwrapped
from .checks import check_alone, check_ranks, check_same_config, check_sharding, check_stepped
from .learning_rates import learning_rates_of
from .optimizers import config_for_optimizer


logger = logging.get_logger(__name__)


class Sparsifier:
    """Makes a model sparse in a training loop of one's own, as [`SparsityCallback`] does in a `Trainer`.

    Call [`step`] once after each `optimizer.step()` and `lr_scheduler.step()`. With Accelerate, make it after
    `accelerator.prepare` (with DDP, before it works as well), and give it to `accelerator.register_for_checkpointing`:
    `save_state`, after [`before_save`], and `load_state` then resume the run to the same bits. Steps that only
    accumulate gradients do not count; steps that fp16's gradient scaler skips do.

    Args:
        model (`nn.Module`): The model, prepared by Accelerate or not.
        optimizer (`LpAdamW` or `AcceleratedOptimizer`): Steps it.
        lp_config (`LpDecayConfig`): How the model is made sparse.
        num_training_steps (`int`): Optimizer steps in the run.
        num_warmup_steps (`int`, *optional*, defaults to 0): Steps in which the learning rate warms up, before which
            the ramp does not begin.
        lr_scheduler (`LRScheduler` or `AcceleratedScheduler`, *optional*): Sets the learning rate. Plans need the rates
            of the steps ahead, which are exact for a `LambdaLR`, such as those of `get_scheduler`.
        calibration_batches (`Iterable[dict]`, *optional*): Training batches on the model's device, for
            `lp_config.calibration_batches`; a prepared dataloader for example.

    Raises:
        ValueError: If nothing can be selected, if the ramp is too short, if the optimizer is another one, under FSDP1
            or DeepSpeed, or if `lp_config` asks for distillation, which needs the loss, or for an
            `embedding_learning_rate`, which a group of your optimizer can have.

    Example:

    ```python
    >>> model, optimizer, dataloader, lr_scheduler = accelerator.prepare(model, optimizer, dataloader, lr_scheduler)
    >>> sparsifier = Sparsifier(
    ...     model, optimizer, LpDecayConfig(target_sparsity=0.5), num_training_steps, lr_scheduler=lr_scheduler
    ... )
    >>> for batch in dataloader:
    ...     with accelerator.accumulate(model):
    ...         accelerator.backward(model(**batch).loss)
    ...         optimizer.step()
    ...         lr_scheduler.step()
    ...         sparsifier.step()
    ...         optimizer.zero_grad()
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lp_config: LpDecayConfig,
        num_training_steps: int,
        *,
        num_warmup_steps: int = 0,
        lr_scheduler: Any = None,
        calibration_batches: Iterable[dict[str, Any]] | None = None,
    ):
        check_alone(lp_config, "Sparsifier")
        if AcceleratorState._shared_state:  # an Accelerator was made
            check_sharding(AcceleratorState(), lp_config, deepspeed=False)
        check_ranks(lp_config)
        self._optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        check_stepped(self._optimizer, "Sparsifier", "make it LpAdamW(model.parameters(), lr=...)")
        if is_compiled_module(model):
            forget_compiled()
        self._model = unwrapped(model)
        self.lp_config = lp_config = config_for_optimizer(self._optimizer, lp_config, self._model)
        self._lr_scheduler = lr_scheduler
        self._steps = (num_training_steps, num_warmup_steps)
        self._names = list(participants(self._model, lp_config))
        self._step = 0
        self._driver = self._make_driver()
        end = 0 if self._driver.ramp is None else self._driver.ramp.end
        self._average = average_of(self._optimizer, lp_config.average_weights, num_training_steps, end)
        self._optimizer.register_step_pre_hook(self._before_step)
        state = PartialState()
        if state.is_main_process:
            tqdm.write(self._driver.describe())
        self._driver.start(self._learning_rates(), calibration_batches, show_progress=state.is_local_main_process)

    @property
    def lp_modules(self) -> list[str]:
        """Names of the modules whose weights become sparse, for `target_modules` of `measure_sparsity`."""
        return [name.removesuffix(".weight") for name in self._names]

    def step(self) -> None:
        """Call after each optimizer step; while gradients are accumulated, it does nothing."""
        if not GradientState().sync_gradients:
            return
        self._step += 1
        self._driver.after_step(self._step, self._learning_rates())
        if self._average is not None:
            self._average.after_step(self._step)

    def before_save(self) -> None:
        """Call in every process before a checkpoint is written: it holds what the first one has collected.

        Averages that over all processes. Where there is only one, it does nothing.
        """
        self._driver.average_collected()

    def metrics(self) -> dict[str, float]:
        """Numbers for a tracker: `sparsity` of the selected weights, `lp_lambda` and `lp_phase` (0 dense, 1 decay,
        2 settle)."""
        return self._driver.metrics()

    def finish(self) -> None:
        """Remove the hooks; only needed where the loop ends before the ramp does."""
        self._driver.finish()
        shortfall = self._driver.shortfall()  # every process counts its part
        if shortfall and PartialState().is_main_process:
            logger.warning_once(shortfall)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the model, the optimizer and the learning rate scheduler."""
        return {"step": self._step, "lp_config": asdict(self.lp_config), "names": self._names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the run of a checkpoint, after model, optimizer and scheduler were loaded.

        Args:
            state_dict (`dict`): As returned by `state_dict()`.

        Raises:
            ValueError: If the checkpoint was trained with another config.
        """
        check_same_config(state_dict["lp_config"], self.lp_config)
        self._driver.remove_hooks()
        self._step, self._names = state_dict["step"], list(state_dict["names"])
        self._driver = self._make_driver()
        self._driver.start(self._learning_rates())

    def _make_driver(self) -> SparsityDriver:
        params = dict(self._model.named_parameters())
        selected = {name: params[name] for name in self._names}
        return SparsityDriver(self.lp_config, self._model, selected, self._optimizer, *self._steps, step=self._step)

    def _learning_rates(self):
        return learning_rates_of(self._optimizer, self._lr_scheduler)

    def _before_step(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
        missing = [name for name, param in self._driver.params.items() if id(param) not in stepped]
        if missing:
            raise ValueError(
                f"The optimizer does not step {missing[0]}, which the Sparsifier has selected: give the optimizer all"
                " selected parameters, and make the Sparsifier after accelerator.prepare, which replaces them under"
                " FSDP2."
            )
        self._driver.before_step()
