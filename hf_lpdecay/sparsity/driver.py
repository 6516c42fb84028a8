"""`SparsityDriver`: one object that drives a run, from the calibration to the exact cut."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .activations import ActivationStatistics
from .calibration import calibrate
from .compensation import Compensation
from .controller import SparsityController
from .experts import expert_weights
from .importance import FROM_HOOKS
from .patterns import parse_pattern
from .report import count_nonzero
from .schedule import DECAY, DENSE, SETTLE, PlainSchedule, Ramp
from .selection import block_weights_left_out, input_dims, selected_units
from .sharding import whole
from .swaps import swap


if TYPE_CHECKING:  # it checks its pattern with this room
    from ..config import LpDecayConfig

# Trackers take numbers.
PHASE_NUMBERS = {DENSE: 0, DECAY: 1, SETTLE: 2}
# For each of the optimizer's groups the learning rates from one step to another (exclusive), where 0 is the next step.
LearningRates = Callable[[int, int], list[list[float]]]


class SparsityDriver:
    """Drives selected weights through a run: schedule, importance, compensation, decay and cut, and the metrics of it.

    Whoever steps the optimizer calls [`start`] before the first step, [`before_step`] and [`after_step`] around each
    one, and [`finish`] at the end.

    Args:
        config (`LpDecayConfig`): How the model is made sparse.
        model (`nn.Module`): The model itself, without a wrapper such as DDP.
        params (`dict[str, torch.Tensor]`): The selected parameters by name, see [`~.selection.participants`].
        optimizer (`LpAdamW`): Steps them.
        total_steps (`int`): Optimizer steps in the run.
        warmup_steps (`int`, *optional*, defaults to 0): Steps in which the learning rate warms up.
        step (`int`, *optional*, defaults to 0): Steps taken before, in a resumed run.
        stepped (`dict[str, torch.Tensor]`, *optional*): The tensors that the optimizer steps in place of `params`.
        compensate (`bool`, *optional*, defaults to `True`): Whether compensation is possible in this run, if `config`
            does not decide on it.
        make_controller (`Callable`, *optional*): Makes the controller, called like [`SparsityController`].

    Raises:
        ValueError: If the ramp is too short, or the pattern does not fit.
    """

    def __init__(
        self,
        config: "LpDecayConfig",
        model: nn.Module,
        params: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        warmup_steps: int = 0,
        step: int = 0,
        stepped: dict[str, Tensor] | None = None,
        compensate: bool = True,
        make_controller: Callable[..., SparsityController] = SparsityController,
    ):
        self.config = config
        self.params = params
        self.ramp: Ramp | None = None
        self._optimizer = optimizer
        self._model = model
        self._stepped = stepped or params
        self._step = step
        self._compensates = compensate if config.compensate is None else config.compensate
        self._controller: SparsityController | None = None
        self._schedule: PlainSchedule | None = None
        self._activations: ActivationStatistics | None = None
        self._compensation: Compensation | None = None
        if config.target_sparsity is None:
            self._schedule = PlainSchedule(config, self._stepped, optimizer, total_steps)
            return
        experts = next((name for name, param in params.items() if param.dim() == 3), None)
        if config.importance == "fisher" and experts is not None:
            raise ValueError(
                f"importance='fisher' needs the gradients of each layer's output, and experts ({experts}) do not show"
                " theirs: take importance='activation' with scope='layer', or an optimizer with a second moment."
            )
        self.ramp = Ramp.from_config(config, total_steps, warmup_steps)
        units, dims = selected_units(model, config, params), input_dims(model)
        if self._compensates and step < self.ramp.end:
            inputs = {param: dims.get(name, 1) for name, param in params.items()}
            group = parse_pattern(config.pattern).swap_group
            improve = partial(swap, rounds=config.mask_swaps, group=group) if config.mask_swaps else None
            self._compensation = Compensation(model, inputs, optimizer, config.hessians_on_cpu, improve)
        self._controller = make_controller(config, params, optimizer, self.ramp, dims, units, self._compensation)
        calibrates = config.calibration_batches > 0 and step == 0
        # Wanda's activations are those of the dense model; the Fisher information is followed through the ramp.
        self._last_collected = self.ramp.end if config.importance == "fisher" else self.ramp.start
        if config.importance in FROM_HOOKS and (calibrates or step < self._last_collected):
            gradients = config.importance == "fisher"
            self._activations = ActivationStatistics(model, list(params.values()), optimizer, gradients)

    def start(
        self,
        learning_rates: LearningRates,
        batches: Iterable[dict[str, Any]] | None = None,
        show_progress: bool = True,
    ) -> None:
        """Calibrate and make the first plan in a new run, or go on with the plan of a resumed one.

        Args:
            learning_rates (`Callable[[int, int], list[list[float]]]`): For each of the optimizer's groups the learning
                rates from one step to another (exclusive), where 0 is the next step.
            batches (`Iterable[dict]`, *optional*): Training batches on the model's device, for calibration.
            show_progress (`bool`, *optional*, defaults to `True`): Whether calibration shows a progress bar.

        Raises:
            ValueError: If there are no batches to calibrate with, if the optimizer has a decay of its own for
                parameters that are not selected, or if a resumed run lacks what its checkpoint cannot hold.
        """
        if self._step:
            if self._controller is not None:
                self._controller.resume(self._step, learning_rates)
            return
        self._forget_last_run()
        self._mark()
        if self._controller is not None:
            self._keep_zeros()
        config = self.config
        if config.calibration_batches:
            params = list(self.params.values()) if config.importance == "adam" else []
            gradients, count = config.importance in ("adam", "fisher"), config.calibration_batches
            calibrate(self._model, params, self._optimizer, batches or (), count, gradients, show_progress)
        self.after_step(0, learning_rates)

    def before_step(self) -> None:
        """Call before each optimizer step."""
        if self._controller is not None:
            self._controller.before_step()

    def after_step(self, step: int, learning_rates: LearningRates) -> None:
        """Call after each optimizer step, and before a checkpoint of it is written: that holds the plan.

        Args:
            step (`int`): Optimizer steps taken so far.
            learning_rates (`Callable`): See [`start`].
        """
        self._step = step
        if self._schedule is not None:
            self._schedule.after_step(step)
        if self._controller is not None:
            if step == self._last_collected:
                self._finish_activations()
            elif self._activations is not None and self.ramp.next_plan(step) is not None:
                self._activations.average()
            self._controller.after_step(step, learning_rates)

    def average_collected(self) -> None:
        """Average over all processes what each has collected; in all of them, before one writes a checkpoint."""
        for collector in (self._activations, self._compensation):
            if collector is not None:
                collector.average()

    def finish(self) -> None:
        """Remove the hooks and free what only the ramp needs."""
        self._finish_activations()
        if self._compensation is not None:
            self._compensation.finish()
            self._compensation = None

    def remove_hooks(self) -> None:
        """Remove the hooks, where another driver takes over what the optimizer's state holds."""
        for collector in (self._activations, self._compensation):
            if collector is not None:
                collector.remove_hooks()

    def shortfall(self) -> str | None:
        """One sentence if the run ends before its ramp does, without the target."""
        if self.ramp is None or self._step >= self.ramp.end:
            return None
        return (
            f"Training stopped after step {self._step}, before the ramp's end at step {self.ramp.end}: the selected"
            f" weights are {self.sparsity():.2%} zero, not {self.ramp.target:.2%}."
        )

    @torch.no_grad()
    def sparsity(self) -> float:
        """Exact zeros in the selected weights, as a fraction of them."""
        nonzeros = torch.stack([whole(count_nonzero(param)) for param in self.params.values()]).sum().item()
        return 1.0 - nonzeros / sum(param.numel() for param in self.params.values())

    def metrics(self) -> dict[str, float]:
        """Numbers for the logs: `sparsity` of the selected weights, `lp_lambda` and `lp_phase` (0 dense, 1 decay,
        2 settle)."""
        if self._controller is None:
            optimizer = self._optimizer
            strengths = (
                optimizer.state[param].get("lp_lambda", group["lp_lambda"])
                for group in optimizer.param_groups
                for param in group["params"]
            )
            lp_lambda, phase = max(strengths), DECAY
        else:
            lp_lambda, phase = self._controller.lp_lambda(), self.ramp.phase(self._step)
        return {"sparsity": self.sparsity(), "lp_lambda": lp_lambda, "lp_phase": PHASE_NUMBERS[phase]}

    def describe(self) -> str:
        """One line for the start of a run: what becomes sparse, when and how, and which tensors like it do not."""
        config, numel = self.config, sum(param.numel() for param in self.params.values())
        trained = any(param.requires_grad for param in self.params.values())
        alike = {name: p.numel() for name, p in self._model.named_parameters() if p.requires_grad == trained}
        others = [name for name in alike if name not in self.params]
        total = sum(alike.values())
        if self.ramp is None:
            plan = f"lp_lambda={config.lp_lambda:g} throughout"
        else:
            plan = (
                f"to {config.target_sparsity:.1%} zeros ({config.pattern}) per"
                f" {'layer' if config.scope == 'layer' else 'model'} from step {self.ramp.start} to {self.ramp.end},"
                f" importance={config.importance},{'' if config.hard_cut else f' trim={config.trim},'}"
                f" compensate={self._compensates}" + (f", mask_swaps={config.mask_swaps}" if config.mask_swaps else "")
            )
        if config.average_weights:
            plan += f", then the mean of the weights over the last {config.average_weights:.0%} of the steps"
        examples = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        what = "hard cut" if config.hard_cut else f"p-norm decay (p={config.p:g})"
        return (
            f"{what} on {len(self.params)} of {len(alike)} {'trained' if trained else 'frozen'} tensors, {numel:,} of"
            f" {total:,} weights ({numel / total:.1%}), {plan}; not on {len(others)} others"
            + (f" ({examples})." if others else ".")
            + self._describe_experts()
            + self._describe_left_out()
        )

    def _describe_experts(self) -> str:
        """Which way round the selected matrices of experts are stored, which differs by model."""
        dims = {dim for name, (_, dim) in expert_weights(self._model).items() if name in self.params}
        orders = ["input x output" if dim == 0 else "output x input" for dim in sorted(dims)]
        return f" The experts' matrices are stored as {' and '.join(orders)}." if orders else ""

    def _describe_left_out(self) -> str:
        """Which matrices of the blocks take no part, with their share."""
        left_out = block_weights_left_out(self._model, self.params)
        if not left_out:
            return ""
        size = sum(left_out.values())
        share = size / (size + sum(param.numel() for param in self.params.values()))
        few = ", ".join(list(left_out)[:3]) + (", ..." if len(left_out) > 3 else "")
        return f" {share:.1%} of the weights in the blocks take no part: {few}."

    def _finish_activations(self) -> None:
        if self._activations is not None:
            self._activations.finish()
            self._activations = None

    @torch.no_grad()
    def _keep_zeros(self) -> None:
        """Keep the zeros of a model that is sparse already; a target below what it has is refused."""
        config = self.config
        zeros = {name: param.numel() - int(whole(count_nonzero(param))) for name, param in self.params.items()}
        if config.pattern == "unstructured" and not config.freeze_zeros:
            together = {"the selected weights": list(self.params)}
            pools = together if config.scope == "global" else {name: [name] for name in self.params}
            for what, names in pools.items():
                numel, has = sum(self.params[name].numel() for name in names), sum(zeros[name] for name in names)
                if has > round(config.target_sparsity * numel):
                    raise ValueError(
                        f"target_sparsity={config.target_sparsity} is below the {has / numel:.2%} zeros that {what}"
                        " already have: choose a higher target, or keep them with freeze_zeros=True."
                    )
        if any(zeros.values()) and config.pattern != "rank":  # LoRA's B starts at zero
            self._controller.freeze_zeros()

    def _forget_last_run(self) -> None:
        """Drop the plan of a run that was interrupted, where its optimizer begins another one."""
        config, optimizer = self.config, self._optimizer
        stepped = {id(param) for param in self._stepped.values()}
        planned = False
        for param in self._stepped.values():
            state = optimizer.state.get(param, {})
            for name in [name for name in state if str(name).startswith("lp_")]:
                planned = True
                del state[name]
        for group in optimizer.param_groups if planned else ():
            group.pop("pattern", None)
            if all(id(param) in stepped for param in group["params"]):
                group.update(lp_lambda=config.lp_lambda or 0.0, freeze_zeros=config.freeze_zeros)

    def _mark(self) -> None:
        """Mark the selected parameters in groups that hold others too, such as those that a plain `Trainer` makes.

        To split a group now would be too late: the scheduler and a checkpoint's optimizer state are fitted to it.
        """
        optimizer, config = self._optimizer, self.config
        selected = {id(param) for param in self._stepped.values()}
        for group in optimizer.param_groups:
            chosen = [param for param in group["params"] if id(param) in selected]
            if len(chosen) == len(group["params"]):
                continue
            for option in ("lp_lambda", "freeze_zeros"):
                if group[option]:
                    raise ValueError(
                        f"LpAdamW was given {option}={group[option]} for all parameters, embeddings and biases too:"
                        " leave it out, it is set where the LpDecayConfig says."
                    )
            if config.freeze_zeros:
                for param in chosen:
                    optimizer.state[param]["lp_freeze_zeros"] = True
        for group in optimizer.param_groups:  # without a strength they do nothing
            group.update(p=config.p, post_step=config.post_step, s_rate=config.s_rate)
