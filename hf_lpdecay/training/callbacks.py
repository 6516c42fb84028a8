"""`SparsityCallback`: drives the p-norm decay from a `Trainer`, and says what it does."""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, extract_model_from_parallel, is_compiled_module
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ..config import LpDecayConfig
from ..sparsity import SparsityDriver, participants
from ..sparsity.driver import LearningRates
from .averaging import WeightAverage, average_of
from .best import BestFromTarget
from .checks import check_alone, check_optimizer, check_ranks, check_same_config
from .frozen import FrozenBase
from .learning_rates import learning_rates_of
from .optimizers import config_for_optimizer
from .saved_names import accept_saved_names
from .zero import ZeroController, find_ranges


logger = logging.get_logger(__name__)


class SparsityCallback(TrainerCallback, ExportableState):
    """Drives the p-norm decay of an [`~hf_lpdecay.LpAdamW`] that a `Trainer` steps.

    [`LpDecayMixin`] adds it by itself. A `Trainer` of any class can be given it together with the optimizer; the same
    weights become zero, and a run resumes as exactly. Evaluations from before the target is reached do not count for
    `metric_for_best_model`, nor for early stopping.

    Args:
        lp_config (`LpDecayConfig` or `dict`): How the model is made sparse.
        names (`list[str]`, *optional*): Names of the parameters that take part. Defaults to what `lp_config` selects
            when training begins.

    Raises:
        ValueError: If `lp_config` asks for distillation or an `embedding_learning_rate`, which need [`LpDecayMixin`].

    Example:

    ```python
    >>> trainer = Trainer(
    ...     model,
    ...     args,
    ...     train_dataset=data,
    ...     optimizer_cls_and_kwargs=(LpAdamW, {"lr": args.learning_rate}),
    ...     callbacks=[SparsityCallback(LpDecayConfig(target_sparsity=0.5))],
    ... )
    ```
    """

    def __init__(self, lp_config: LpDecayConfig | dict[str, Any], names: list[str] | None = None):
        self.lp_config = LpDecayConfig(**lp_config) if isinstance(lp_config, dict) else lp_config
        self.names = names
        self.frozen: FrozenBase | None = None  # set by the trainer, where a frozen base becomes sparse
        if names is None:
            check_alone(self.lp_config, "SparsityCallback")
        self._driver: SparsityDriver | None = None
        self._best: BestFromTarget | None = None
        self._average: WeightAverage | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the config, against which a resumed run is checked, and the names."""
        if self._best is not None:
            self._best.on_save()
        return {"args": {"lp_config": asdict(self.lp_config), "names": self.names}, "attributes": {}}

    def take_over(self, other: "SparsityCallback") -> None:
        """Go on in place of another one in the same trainer: with its frozen base, and the hooks that it has set."""
        self.frozen, self._driver = other.frozen, other._driver

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs):
        accept_saved_names(unwrapped(model))  # a run is resumed before training begins

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs,
    ):
        check_ranks(self.lp_config)
        if self.frozen is None:
            inner = check_optimizer(optimizer, self.lp_config)
            self.lp_config = config_for_optimizer(inner, self.lp_config, unwrapped(model))
        self.check_checkpoint(state)
        if state.global_step and not optimizer.state:
            raise ValueError(
                f"Nothing of the optimizer was loaded from the checkpoint at step {state.global_step}: it was saved"
                " with save_only_model, or with DeepSpeed. Resume in the way that it was written, or start a new run"
                " from its weights."
            )
        if self._driver is not None:  # of a run that was interrupted
            self._driver.remove_hooks()
        compiled = args.torch_compile or is_compiled_module(model)
        if compiled:
            forget_compiled()
        model = unwrapped(model) if self.frozen is None else self.frozen.model
        if self.names is None:
            self.names = list(participants(model, self.lp_config))
        all_params = dict(model.named_parameters())
        params = {name: all_params[name] for name in self.names}
        options: dict[str, Any] = {"compensate": not compiled}  # a compiled model is compiled anew with every hook
        if AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
            ranges = find_ranges(optimizer, params)
            options = {
                "compensate": False,
                "stepped": {name: one.partition for name, one in ranges.items()},
                "make_controller": partial(ZeroController, ranges),
            }
        self._driver = SparsityDriver(
            self.lp_config,
            model,
            params,
            optimizer if self.frozen is None else self.frozen,
            total_steps=state.max_steps,
            warmup_steps=args.get_warmup_steps(state.max_steps),
            step=state.global_step,
            **options,
        )
        if state.is_world_process_zero:
            tqdm.write(self._driver.describe())
        ramp = self._driver.ramp
        end = 0 if ramp is None else ramp.end
        self._average = average_of(optimizer, self.lp_config.average_weights, state.max_steps, end)
        if ramp is not None and args.metric_for_best_model is not None:
            self._best = BestFromTarget(args, state, ramp.end)
        rates = self._learning_rates(optimizer, kwargs["lr_scheduler"])
        show_progress = state.is_local_process_zero and not args.disable_tqdm
        self._driver.start(rates, kwargs["train_dataloader"], show_progress)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._driver.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs
    ):
        if self.frozen is not None and not optimizer.step_was_skipped:
            self.frozen.step(float(optimizer.param_groups[0]["lr"]), state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs
    ):
        # Before the step is logged, evaluated and saved, so that a checkpoint holds the plan that follows it.
        self._driver.after_step(state.global_step, self._learning_rates(optimizer, kwargs["lr_scheduler"]))
        if self._average is not None:
            self._average.after_step(state.global_step)
        if self._best is not None:
            self._best.on_step_end()
        self._before_save(args, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._before_save(args, control)

    def _before_save(self, args: TrainingArguments, control: TrainerControl) -> None:
        if control.should_save or (control.should_evaluate and args.save_strategy == SaveStrategy.BEST):
            self._driver.average_collected()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics, **kwargs):
        if self._best is not None:
            self._best.on_evaluate(metrics)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if "loss" in logs and "sparsity" not in logs:  # without LpDecayMixin, which also reports to the trackers
            metrics = self.metrics()
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        driver, self._best = self._driver, None
        driver.finish()
        if self._average is not None:
            self._average.finish(state.global_step)
        shortfall = driver.shortfall()  # every process counts its part
        if shortfall and state.is_world_process_zero:
            logger.warning_once(shortfall)

    def metrics(self) -> dict[str, float]:
        """Numbers for the logs: `sparsity` of the selected weights, `lp_lambda` and `lp_phase` (0 dense, 1 decay,
        2 settle). Empty before training has begun."""
        return {} if self._driver is None else self._driver.metrics()

    def _learning_rates(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> LearningRates:
        rates = learning_rates_of(optimizer, scheduler)
        # A frozen base is one group, which decays with the rate of the adapters' first one.
        return rates if self.frozen is None else lambda first, last: rates(first, last)[:1]

    def check_checkpoint(self, state: TrainerState) -> None:
        """Check that a resumed run goes on as it began.

        Args:
            state (`TrainerState`): As the checkpoint has it; that of a new run passes.

        Raises:
            ValueError: If the checkpoint was made with another config, or without this callback.
        """
        if state.global_step == 0:
            return
        saved = state.stateful_callbacks.get(type(self).__name__)
        if not isinstance(saved, dict):
            raise ValueError(
                f"The checkpoint at step {state.global_step} was not written with one SparsityCallback, so it says"
                " nothing about the decay: start a new run from its weights."
            )
        check_same_config(saved["args"]["lp_config"], self.lp_config)
        if self.names is None:  # not chosen anew: a tensor may be zero by now because it was pruned
            self.names = saved["args"]["names"]


def forget_compiled() -> None:
    """Have everything compiled anew: what was compiled for another model, alike but for its hooks, would be used."""
    torch._dynamo.reset()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and DDP, whose parameters' names have no prefix."""
    return extract_model_from_parallel(model, keep_torch_compile=False)
