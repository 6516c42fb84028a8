"""The p-norm decay for any `Trainer`: a mixin over `create_optimizer`, and two ready classes."""

import math
import os
from typing import Any

import torch
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length

from ..card import write_card
from ..config import LpDecayConfig
from ..optim import LpAdamW, LpDecay
from ..sparsity import Ramp, participants
from ..sparsity.selection import own_name
from .callbacks import SparsityCallback, unwrapped
from .checkpoints import WholeCheckpointsMixin, last_whole_checkpoint
from .checks import check_sharding
from .distillation import Distiller, logits_of
from .embeddings import check_embeddings, split_embeddings, trained_embeddings
from .frozen import check_whole, find_frozen_base
from .frozen_trainer import FrozenBaseMixin
from .optimizers import ADAMW, check_optim, config_for
from .record import card_facts, write_record
from .saved_names import accept_saved_names
from .zero import check_matrices


class LpDecayMixin(FrozenBaseMixin, WholeCheckpointsMixin):
    """Makes a `Trainer` train sparse. Put it in front: `class MyTrainer(LpDecayMixin, Trainer)`.

    It makes the optimizer an [`~hf_lpdecay.LpAdamW`] with the learning rate, betas, epsilon and weight decay of the
    `TrainingArguments`, or wraps another one that their `optim` names in an [`~hf_lpdecay.LpDecay`], gives the
    selected weights groups of their own, drives them to the target with a
    [`SparsityCallback`], and puts `sparsity`, `lp_lambda` and `lp_phase` beside the loss in the logs.

    Where the model is a `PeftModel` whose selected base weights are frozen, a target makes them sparse while the
    adapters learn: LoRA adapters are masked for it, other ones refused. The base's weights decay after each step, with
    the adapters' learning rate; they have neither gradients nor moments. With `freeze_zeros=True` alone the adapters
    are masked, and the base stays as it is. [`merge_adapters`] gives the sparse model.

    A loss or gradient that is not finite stops the run before a weight is touched. With a gradient scaler (fp16)
    such a step is skipped, decay included, until no scaling is left that could be to blame. Checkpoints are written
    whole or not at all.

    Args:
        args, kwargs: For the `Trainer`.
        lp_config (`LpDecayConfig`): How the model is made sparse.

    Attributes:
        lp_facts (`dict[str, Any]`): What else sparsity.json and the model card shall say of the model, see
            [`~hf_lpdecay.training.write_record`]. Yours to fill.

    Raises:
        ValueError: If nothing can be selected, if the ramp is too short, or if the arguments ask for another optimizer,
            FSDP1 or DeepSpeed with something that goes beyond flat ranges of weights.
        FloatingPointError: In training, if the loss or the gradient is not finite.
    """

    def __init__(self, *args, lp_config: LpDecayConfig, **kwargs):
        super().__init__(*args, **kwargs)
        self.lp_facts: dict[str, Any] = {}
        self._given_config = lp_config
        self._losses = torch.zeros(3, device=self.args.device)  # the model's own, the distance, steps
        model = unwrapped(self.model)
        self._choose_config(model)
        self._check_can_decay()
        self._choose_weights(model)
        self.add_callback(SparsityCallback(self.lp_config, self._lp_names))
        self._sparsity_callback().frozen = self._frozen

    def _choose_config(self, model: torch.nn.Module) -> None:
        """Find a frozen base, and settle the config for it, or for the optimizer."""
        self._frozen = find_frozen_base(model, self._given_config, self.is_world_process_zero())
        if self._frozen is None:
            check_optim(self.args.optim, self._given_config)
            self.lp_config = config_for(self.args.optim, self._given_config, model)
        else:
            check_whole(self.accelerator.distributed_type, self._frozen.changes)
            self.lp_config = self._frozen.config
        check_embeddings(model, self.lp_config.embedding_learning_rate)

    def _choose_weights(self, model: torch.nn.Module) -> None:
        """Select the weights and make the teacher, from the untrained model: in the middle of a run a tensor may be
        zero because it was pruned, and a model that is resumed is no longer what it was."""
        accept_saved_names(model)
        params = participants(model, self.lp_config) if self._frozen is None else self._frozen.params
        if self.is_deepspeed_enabled:
            check_matrices(params)
        self._lp_names = list(params)
        labels = ("labels", *self.label_names)
        self._distiller = Distiller(self.lp_config, model, labels) if self.lp_config.distill else None

    def call_model_init(self, trial: Any = None) -> torch.nn.Module:
        """Make the model anew, as `train` does with a `model_init`: what was found in the last one goes with it."""
        model = super().call_model_init(trial)
        if hasattr(self, "lp_config"):  # the first one is looked at in __init__
            self._choose_config(model)
            self._choose_weights(model)
            callback = self._sparsity_callback()
            callback.lp_config, callback.names, callback.frozen = self.lp_config, self._lp_names, self._frozen
        return model

    @property
    def lp_modules(self) -> list[str]:
        """Names of the modules whose weights become sparse, for `target_modules` of `measure_sparsity`."""
        return [own_name(name).removesuffix(".weight") for name in self._lp_names]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Make an [`~hf_lpdecay.LpAdamW`], or an [`~hf_lpdecay.LpDecay`] around what `optim` names, grouped as the
        `Trainer` does, by whether the p-norm decay acts, and by whether `embedding_learning_rate` holds."""
        if self.optimizer is not None:
            return self.optimizer
        inner = unwrapped(self.model if model is None else model)
        if self._frozen is not None:  # no decay acts on what is stepped
            super().create_optimizer(model)
        else:
            self._create_decaying(model)
            params = dict(inner.named_parameters())
            selected = {id(params[name]) for name in self._lp_names}
            _split_groups(self.optimizer, selected, self.lp_config, alone=self.is_deepspeed_enabled)
        rate = self.lp_config.embedding_learning_rate
        if rate is not None:
            split_embeddings(self.optimizer, trained_embeddings(inner), rate)
        return self.optimizer

    def _create_decaying(self, model: torch.nn.Module | None) -> None:
        chosen = self.optimizer_cls_and_kwargs
        wrapped = self.args.optim not in ADAMW and chosen is None
        if chosen is None and not wrapped:
            options = {
                "lr": self.args.learning_rate,
                "betas": (self.args.adam_beta1, self.args.adam_beta2),
                "eps": self.args.adam_epsilon,
                "fused": None if self.args.optim == "adamw_torch_fused" else False,
            }
            self.optimizer_cls_and_kwargs = (LpAdamW, options)
        try:
            super().create_optimizer(model)
        finally:  # another run may have another learning rate
            self.optimizer_cls_and_kwargs = chosen
        if wrapped:
            self.optimizer = LpDecay(self.optimizer)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train as `Trainer.train` does; `resume_from_checkpoint=True` takes the newest checkpoint that is whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"No whole checkpoint in {self.args.output_dir} to resume from.")
        if resume_from_checkpoint:  # before the model is loaded
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            self._sparsity_callback().check_checkpoint(state)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The `Trainer`'s loss, in training plus the distance from the teacher if there is one."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if self._distiller is not None:
            loss, outputs = self._distilled_loss(model, inputs, num_items_in_batch)
        elif return_outputs:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        else:
            loss, outputs = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch), None
        # A loss that is not finite makes the gradient so, on every process: then the norm alone need be looked at.
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss.dtype)
        return (loss, outputs) if return_outputs else loss

    def _distilled_loss(self, model, inputs, num_items_in_batch):
        what = f"distill={self.lp_config.distill!r} compares the teacher's and the student's logits where there are"
        if not any(name in inputs for name in ("labels", *self.label_names)):
            raise ValueError(f"{what} labels, and the batches of {type(self).__name__} have none: leave it out.")
        if self.lp_config.distill_hidden:
            inputs = {**inputs, "output_hidden_states": True}
        # A copy, since the Trainer takes the labels out for some losses.
        loss, outputs = super().compute_loss(model, dict(inputs), True, num_items_in_batch=num_items_in_batch)
        logits = logits_of(outputs)
        # Without a gradient are such as those of TRL's fused head, computed anew for metrics.
        if not logits or not all(tensor.requires_grad for tensor in logits):
            found = "those here have no gradient" if logits else f"the outputs are {', '.join(outputs)}"
            raise ValueError(f"{what} labels, and {found}: leave it out.")
        inputs.pop("output_hidden_states", None)
        distance, count = self._distiller.loss(inputs, outputs)
        # Scaled as the Trainer scales the loss over accumulated batches and devices.
        steps = 1.0 / self.current_gradient_accumulation_steps
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            devices = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            distance, share = distance * devices / num_items_in_batch, 1.0
        else:
            distance, share = distance / count.clamp_min(1), steps
        self._losses += torch.stack([loss.detach(), distance.detach(), torch.ones_like(loss)]) * loss.new_tensor(
            [share, share, steps]
        )
        return loss + self.lp_config.distill_weight * distance, outputs

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm that the `Trainer` has of every step anyway: the last look before the weights are touched."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler = self.accelerator.scaler
        if scaler is None:
            stop = not math.isfinite(grad_norm)
        else:  # it skips such a step and halves its scale; below 1 the gradient itself is not finite
            stop = self.accelerator.optimizer_step_was_skipped and scaler.get_scale() < 1
        if stop:
            checkpoint = last_whole_checkpoint(self.args.output_dir)
            raise FloatingPointError(
                f"The loss or the gradient is not finite at step {self.state.global_step + 1} (gradient norm"
                f" {float(grad_norm)}): the step was not taken. "
                + (f"The last good checkpoint is {checkpoint}" if checkpoint else "No checkpoint was written yet")
                + f". Look at the batch, lower the learning rate (now {self._get_learning_rate():g}) or warm up for"
                " longer, and resume or start again."
            )
        return grad_norm

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log, with the state of the decay beside the training loss."""
        if "loss" in logs:
            logs.update(self._sparsity_callback().metrics())
            if self._distiller is not None:
                logs["loss_task"], logs["loss_distill"] = (self._losses[:2] / self._losses[2]).tolist()
                self._losses = torch.zeros(3, device=self.args.device)
        super().log(logs, *args, **kwargs)

    def create_model_card(self, model_name: str | None = None, **facts: Any) -> None:
        """Write sparsity.json and the model card, README.md, into the output folder; `push_to_hub` calls it.

        Args:
            model_name (`str`, *optional*): Title of the card.
            facts (`Any`): As for `Trainer.create_model_card`: `language`, `license`, `tags`, `finetuned_from`, `tasks`,
                and the data set's id as `dataset_tags`, `dataset` or TRL's `dataset_name`.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PreTrainedModel):  # an adapter, or a model that from_pretrained cannot load
            super().create_model_card(model_name=model_name, **facts)
            return
        # TRL asks for a card with every checkpoint, when the output folder does not hold the model yet.
        if not self.is_world_process_zero() or self.is_in_train:
            return
        write_record(self, self.args.output_dir, **card_facts(facts))
        write_card(self.args.output_dir, self.hub_model_id, model_name)

    def _check_can_decay(self) -> None:
        if self._frozen is None:
            self._check_optimizer()
        elif self.optimizer is not None and self.lp_config.embedding_learning_rate is not None:
            raise ValueError(
                f"embedding_learning_rate={self.lp_config.embedding_learning_rate} has no effect on the optimizer of"
                " optimizers=: leave it out, and give that optimizer a group with that lr."
            )
        check_sharding(self.accelerator.state, self.lp_config)
        if any(isinstance(callback, SparsityCallback) for callback in self.callback_handler.callbacks):
            raise ValueError(
                f"callbacks= holds a SparsityCallback, but {type(self).__name__} adds its own: leave it out, or train"
                " with a plain Trainer."
            )
        steps = self._total_steps()
        if self.lp_config.target_sparsity is not None and steps is not None:
            Ramp.from_config(self.lp_config, steps, self.args.get_warmup_steps(steps))

    def _check_optimizer(self) -> None:
        if self.optimizer is not None:
            raise ValueError(
                f"optimizers= holds a {type(self.optimizer).__name__}, but {type(self).__name__} makes its own LpAdamW:"
                " leave it out, or train with a plain Trainer."
            )
        chosen = self.optimizer_cls_and_kwargs
        if chosen is not None and chosen[0] is not LpAdamW:
            raise ValueError(
                f"optimizer_cls_and_kwargs names {chosen[0].__name__}, but {type(self).__name__} needs LpAdamW."
            )
        if self.args.optim not in ADAMW and chosen is None:
            self.get_optimizer_cls_and_kwargs(self.args, self.model)  # says what is not installed

    def _total_steps(self) -> int | None:
        """Optimizer steps in the run, as far as it can be known before it starts."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        if self.train_dataset is None or not has_length(self.train_dataset):
            return None
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]


class LpDecayTrainer(LpDecayMixin, Trainer):
    """A `Trainer` that trains sparse. See [`LpDecayMixin`].

    Example:

    ```python
    >>> trainer = LpDecayTrainer(model, args, train_dataset=data, lp_config=LpDecayConfig(p=0.5, target_sparsity=0.5))
    >>> trainer.train()
    ```
    """


class LpDecaySeq2SeqTrainer(LpDecayMixin, Seq2SeqTrainer):
    """A `Seq2SeqTrainer` that trains sparse. See [`LpDecayMixin`]."""


def _split_groups(
    optimizer: torch.optim.Optimizer, selected: set[int], config: LpDecayConfig, alone: bool = False
) -> None:
    """Split every group by whether the p-norm decay acts, before the scheduler takes note of the groups; if `alone`,
    each parameter on which it acts gets a group, since DeepSpeed puts all of a group into one flat tensor."""
    decayed: dict[str, Any] = {
        "p": config.p,
        "lp_lambda": config.lp_lambda or 0.0,  # with a target the controller plans it
        "freeze_zeros": config.freeze_zeros,
        "post_step": config.post_step,
        "s_rate": config.s_rate,
    }
    plain = {"p": config.p, "lp_lambda": 0.0, "freeze_zeros": False}
    groups = []
    for group in optimizer.param_groups:
        for inside, options in ((True, decayed), (False, plain)):
            params = [param for param in group["params"] if (id(param) in selected) == inside]
            for part in [[param] for param in params] if inside and alone else filter(None, [params]):
                groups.append({**group, **options, "params": part})
    optimizer.param_groups[:] = groups
