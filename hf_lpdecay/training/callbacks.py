"""`SparsityCallback`: drives the controller from a `Trainer`, and says what it does."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, extract_model_from_parallel, is_compiled_module
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..config import LpDecayConfig
from ..sparsity import (
    ActivationStatistics,
    Compensation,
    PlainSchedule,
    Ramp,
    SparsityController,
    calibrate,
    input_dims,
    participants,
    selected_units,
)
from ..sparsity.report import count_nonzero
from ..sparsity.schedule import DECAY, DENSE, SETTLE
from ..sparsity.sharding import whole
from .checks import check_optimizer, check_ranks, differences
from .zero import WeightRange, ZeroController, find_ranges


logger = logging.get_logger(__name__)

# Trackers take numbers.
PHASE_NUMBERS = {DENSE: 0, DECAY: 1, SETTLE: 2}


class SparsityCallback(TrainerCallback, ExportableState):
    """Drives the p-norm decay of an [`~hf_lpdecay.LpAdamW`] that a `Trainer` steps.

    [`LpDecayMixin`] adds it by itself. A `Trainer` of any class can be given it together with the optimizer; the same
    weights become zero, and a run resumes as exactly.

    Args:
        lp_config (`LpDecayConfig` or `dict`): How the model is made sparse.
        names (`list[str]`, *optional*): Names of the parameters that take part. Defaults to what `lp_config` selects
            when training begins.

    Raises:
        ValueError: If `lp_config` asks for distillation, which needs the loss and therefore [`LpDecayMixin`].

    Example:

    ```python
    >>> trainer = Trainer(
    ...     model,
    ...     args,
    ...     train_dataset=data,
    ...     optimizer_cls_and_kwargs=(LpAdamW, {"lr": args.learning_rate}),
    ...     callbacks=[SparsityCallback(LpDecayConfig(p=0.5, target_sparsity=0.5))],
    ... )
    ```
    """

    def __init__(self, lp_config: LpDecayConfig | dict[str, Any], names: list[str] | None = None):
        self.lp_config = LpDecayConfig(**lp_config) if isinstance(lp_config, dict) else lp_config
        self.names = names
        if self.lp_config.distill and names is None:
            raise ValueError(
                f"distill={self.lp_config.distill!r} needs the loss, which a callback does not see: use LpDecayTrainer"
                " or LpDecayMixin, or leave distill out."
            )
        self._params: dict[str, nn.Parameter] = {}
        self._ranges: dict[str, WeightRange] = {}  # what is stepped in their place under DeepSpeed
        self._ramp: Ramp | None = None
        self._controller: SparsityController | None = None
        self._schedule: PlainSchedule | None = None
        self._activations: ActivationStatistics | None = None
        self._compensates: bool | None = None
        self._compensation: Compensation | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the config, against which a resumed run is checked, and the names."""
        return {"args": {"lp_config": asdict(self.lp_config), "names": self.names}, "attributes": {}}

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
        check_optimizer(optimizer, self.lp_config)
        self.check_checkpoint(state)
        if state.global_step and not optimizer.state:
            raise ValueError(
                f"Nothing of the optimizer was loaded from the checkpoint at step {state.global_step}: it was saved"
                " with save_only_model, or with DeepSpeed. Resume in the way that it was written, or start a new run"
                " from its weights."
            )
        compiled = args.torch_compile or is_compiled_module(model)
        model = unwrapped(model)
        if self.names is None:
            self.names = list(participants(model, self.lp_config))
        params = dict(model.named_parameters())
        self._params = {name: params[name] for name in self.names}
        if AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
            self._ranges = find_ranges(optimizer, self._params)
        self._compensates = self.lp_config.compensate
        if self._compensates is None:  # hooks that act now and then have a model compiled anew
            self._compensates = not self._ranges and not compiled
        if state.global_step == 0:  # a checkpoint knows
            self._mark(optimizer)
        if self.lp_config.target_sparsity is None:
            self._schedule = PlainSchedule(self.lp_config, self._stepped(), optimizer, state.max_steps)
        else:
            self._drive(args, state, model, optimizer, kwargs["train_dataloader"])
        if state.is_world_process_zero:
            tqdm.write(self._summary(model))
        if state.global_step == 0:
            self._advance(0, optimizer, kwargs["lr_scheduler"])
        elif self._controller is not None:
            self._controller.resume(state.global_step, _learning_rates(optimizer, kwargs["lr_scheduler"]))

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._controller is not None:
            self._controller.before_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs
    ):
        # Before the step is logged, evaluated and saved, so that a checkpoint holds the plan that follows it.
        self._advance(state.global_step, optimizer, kwargs["lr_scheduler"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if "loss" in logs and "sparsity" not in logs:  # without LpDecayMixin, which the trackers hear as well
            metrics = self.metrics(state.global_step, kwargs["optimizer"])
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._finish_gathering()
        if self._compensation is not None:
            self._compensation.finish()
            self._compensation = None
        if self._ramp is not None and state.global_step < self._ramp.end and state.is_world_process_zero:
            logger.warning_once(
                f"Training stopped after step {state.global_step}, before the ramp's end at step {self._ramp.end}: the"
                f" selected weights are {self.sparsity():.2%} zero, not {self._ramp.target:.2%}."
            )

    def metrics(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Numbers for the logs: `sparsity` of the selected weights, `lp_lambda` and `lp_phase` (0 dense, 1 decay,
        2 settle).

        Args:
            step (`int`): Optimizer steps taken so far.
            optimizer (`torch.optim.Optimizer`): The optimizer that is stepped.

        Returns:
            `dict[str, float]`: Empty before training has begun.
        """
        if not self._params:
            return {}
        if self._controller is None:
            strengths = (
                optimizer.state[param].get("lp_lambda", group["lp_lambda"])
                for group in optimizer.param_groups
                for param in group["params"]
            )
            lp_lambda, phase = max(strengths), DECAY
        else:
            lp_lambda, phase = self._controller.lp_lambda(), self._ramp.phase(step)
        return {"sparsity": self.sparsity(), "lp_lambda": lp_lambda, "lp_phase": PHASE_NUMBERS[phase]}

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
        changed = differences(saved["args"]["lp_config"], asdict(self.lp_config), "now")
        if changed:
            raise ValueError(
                f"This checkpoint was trained with {changed}. Resume with the same LpDecayConfig, or start a"
                " new run in another output_dir."
            )
        if self.names is None:  # not chosen anew: a tensor may be zero by now because it was pruned
            self.names = saved["args"]["names"]

    @torch.no_grad()
    def sparsity(self) -> float:
        """Exact zeros in the selected weights, as a fraction of them."""
        nonzeros = torch.stack([whole(count_nonzero(param)) for param in self._params.values()]).sum().item()
        return 1.0 - nonzeros / sum(param.numel() for param in self._params.values())

    def _drive(self, args: TrainingArguments, state: TrainerState, model: nn.Module, optimizer, batches) -> None:
        """Set up what drives the model to the target."""
        config = self.lp_config
        self._ramp = Ramp.from_config(config, state.max_steps, args.get_warmup_steps(state.max_steps))
        units = selected_units(model, config, self._params)
        dims = input_dims(model)
        if self._compensates and state.global_step < self._ramp.end:
            inputs = {param: dims.get(name, 1) for name, param in self._params.items()}
            self._compensation = Compensation(model, inputs, optimizer)
        if self._ranges:
            self._controller = ZeroController(config, self._ranges, optimizer.optimizer, self._ramp, dims, units)
        else:
            self._controller = SparsityController(
                config, self._params, optimizer, self._ramp, dims, units, self._compensation
            )
        params = list(self._params.values())
        calibrates = config.calibration_batches > 0 and state.global_step == 0
        if config.importance == "activation" and (calibrates or state.global_step < self._ramp.start):
            self._activations = ActivationStatistics(model, params, optimizer)
        if calibrates:
            show = state.is_local_process_zero and not args.disable_tqdm
            gradients = config.importance == "adam"
            calibrate(model, params, optimizer, batches, config.calibration_batches, gradients, show)

    def _advance(self, step: int, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        if self._schedule is not None:
            self._schedule.after_step(step)
        if self._controller is not None:
            if step == self._ramp.start:
                self._finish_gathering()
            self._controller.after_step(step, _learning_rates(optimizer, scheduler))

    def _finish_gathering(self) -> None:
        if self._activations is not None:
            self._activations.finish()
            self._activations = None

    def _stepped(self) -> dict[str, torch.Tensor]:
        """What the optimizer steps: the selected parameters, or what this process holds of them."""
        return {name: one.partition for name, one in self._ranges.items()} or self._params

    def _mark(self, optimizer: torch.optim.Optimizer) -> None:
        """Mark the selected parameters in groups that hold others too, such as those that a plain `Trainer` makes.

        To split a group now would be too late: the scheduler and a checkpoint's optimizer state are fitted to it.
        """
        selected = {id(param) for param in self._stepped().values()}
        for group in optimizer.param_groups:
            chosen = [param for param in group["params"] if id(param) in selected]
            if len(chosen) == len(group["params"]):
                continue
            for option in ("lp_lambda", "freeze_zeros"):
                if group[option]:
                    raise ValueError(
                        f"LpAdamW was given {option}={group[option]} for all parameters, embeddings and biases too:"
                        " leave it out, SparsityCallback sets it where its LpDecayConfig says."
                    )
            if self.lp_config.freeze_zeros:
                for param in chosen:
                    optimizer.state[param]["lp_freeze_zeros"] = True
        for group in optimizer.param_groups:  # without a strength they do nothing
            group.update(p=self.lp_config.p, post_step=self.lp_config.post_step, s_rate=self.lp_config.s_rate)

    def _summary(self, model: nn.Module) -> str:
        config, numel = self.lp_config, sum(param.numel() for param in self._params.values())
        trained = [(name, param.numel()) for name, param in model.named_parameters() if param.requires_grad]
        others = [name for name, _ in trained if name not in self._params]
        total = sum(size for _, size in trained)
        if self._ramp is None:
            plan = f"lp_lambda={config.lp_lambda:g} throughout"
        else:
            whole = "layer" if config.scope == "layer" else "model"
            plan = (
                f"to {config.target_sparsity:.1%} zeros ({config.pattern}) per {whole} from step {self._ramp.start} to"
                f" {self._ramp.end}, importance={config.importance},"
                + ("" if config.hard_cut else f" trim={config.trim},")
                + f" compensate={self._compensates}"
            )
        examples = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        what = "hard cut" if config.hard_cut else f"p-norm decay (p={config.p:g})"
        return (
            f"{what} on {len(self._params)} of {len(trained)} trained tensors, {numel:,} of"
            f" {total:,} weights ({numel / total:.1%}), {plan}; not on {len(others)} others"
            + (f" ({examples})." if others else ".")
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and DDP, whose parameters' names have no prefix."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _learning_rates(optimizer: torch.optim.Optimizer, scheduler: Any) -> Callable[[int, int], list[list[float]]]:
    """The learning rates of the steps before and after now, per group: exact where the scheduler is a function of the
    step."""

    def rates(first: int, last: int) -> list[list[float]]:
        if isinstance(scheduler, LambdaLR):
            steps = range(scheduler.last_epoch + first, scheduler.last_epoch + last)
            return [[lr * factor(i) for i in steps] for lr, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
        return [[float(group["lr"])] * (last - first) for group in optimizer.param_groups]

    return rates
