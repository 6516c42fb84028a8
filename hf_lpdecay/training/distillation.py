"""Distillation from the dense parent: keeps a model close to what it was while its weights become zero."""

import copy
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import LpDecayConfig


# Of extractive question answering: one distribution over the positions of a text each.
_SPAN_LOGITS = ("start_logits", "end_logits")


class Distiller:
    """A frozen teacher and the losses against it.

    Args:
        config (`LpDecayConfig`): With `distill` set.
        model (`PreTrainedModel`): The student, before it is trained; with `distill="self"` it is its own teacher.
        label_names (`Sequence[str]`, *optional*, defaults to `("labels",)`): Names of the inputs that hold labels, as
            `Trainer.label_names` has them. The teacher does not see them.

    Raises:
        ValueError: If the teacher's vocabulary or number of labels is not the student's or, with `distill_hidden`, its
            number of layers or their width.
    """

    def __init__(self, config: LpDecayConfig, model: PreTrainedModel, label_names: Sequence[str] = ("labels",)):
        self.config = config
        self.label_names = label_names
        self.model_config = model.config
        if config.distill == "self":
            self.teacher = _in_bfloat16(model)
        else:
            dense = model.get_base_model() if isinstance(model, PeftModel) else model
            self.teacher = type(dense).from_pretrained(config.distill, dtype=torch.bfloat16)
        for name in ("vocab_size", "num_labels", *(("num_hidden_layers", "hidden_size") * bool(config.distill_hidden))):
            ours, theirs = getattr(model.config, name, None), getattr(self.teacher.config, name, None)
            if ours != theirs:
                raise ValueError(f"distill={config.distill!r} has {name}={theirs}, but the student has {ours}.")
        self.teacher.eval().requires_grad_(False)
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        # A model that predicts the next token has logits one position ahead of its labels.
        predicts_next = getattr(model, "loss_type", None) != "ForMaskedLM" and not self.is_encoder_decoder
        self.shifts = predicts_next and model.get_output_embeddings() is not None

    def loss(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The distance from the teacher, summed over what the labels are for; padding is left out.

        ``T**2 * KL(teacher || student)`` at temperature ``T`` (arXiv 1503.02531), plus `distill_hidden` times the
        normalised distance of the hidden states (SquareHead, arXiv 2310.06927, but each token divided by its own norm).
        The divergence is that of

        - the classes of `logits`: per example, or per token whose label is not -100 and which is no padding;
        - yes and no, for each entry of `logits` where the labels have the same shape (several labels per example);
        - the positions of a text, in the mean of `start_logits` and `end_logits`.

        Logits that are values and not of classes (regression) have their squared distance instead.

        Args:
            inputs (`dict[str, torch.Tensor]`): The student's inputs, labels included.
            outputs (`dict[str, torch.Tensor]`): The student's outputs, with `logits` or `start_logits` and
                `end_logits`; with `hidden_states` if `distill_hidden` is not zero.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The sum, and the number of labels over which it is averaged.

        Raises:
            ValueError: If the logits have more than three dimensions.
        """
        theirs = self._ask_teacher(inputs, logits_of(outputs)[0].device)
        labels = inputs.get("labels")
        if "logits" in outputs:
            total, count = self._distance(outputs["logits"], theirs["logits"], labels, inputs.get("attention_mask"))
        else:
            mask = inputs.get("attention_mask")
            total = sum(self._span_distance(outputs[name], theirs[name], mask) for name in _SPAN_LOGITS) / 2
            count = total.new_tensor(outputs[_SPAN_LOGITS[0]].shape[0])
        if self.config.distill_hidden:
            total = total + self.config.distill_hidden * count * _square_head(inputs, outputs, theirs)
        return total, count

    @torch.no_grad()
    def _ask_teacher(self, inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        if self.teacher.device != device:
            self.teacher.to(device)
        given = {name: value for name, value in inputs.items() if name not in self.label_names}
        if self.is_encoder_decoder and "labels" in inputs:
            given["labels"] = inputs["labels"]  # from which it makes the decoder's inputs
        return self.teacher(**given, output_hidden_states=self.config.distill_hidden > 0)

    def _distance(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if student.dim() > 3:
            raise ValueError(
                f"distill={self.config.distill!r} compares logits per example or per token, and these have the shape"
                f" {tuple(student.shape)}: leave it out."
            )
        if labels is not None and labels.shape == student.shape:
            valid = labels != -100
            student, teacher = student[valid].float(), teacher[valid].float()
            if getattr(self.model_config, "problem_type", None) == "regression":
                return (student - teacher).square().sum(), valid.sum()
            # yes and no are a softmax over the logit and zero
            pairs = (torch.stack([logits, torch.zeros_like(logits)], -1) for logits in (student, teacher))
            return self._divergence(*pairs), valid.sum()
        if self.shifts:
            student, teacher = student[..., :-1, :], teacher[..., :-1, :]
            labels = None if labels is None else labels[..., 1:]
            mask = None if mask is None else mask[..., :-1] & mask[..., 1:]
        fits = labels is not None and labels.shape == student.shape[:-1]
        valid = labels != -100 if fits else student.new_ones(student.shape[:-1], dtype=torch.bool)
        # An encoder-decoder's mask is that of the encoder's inputs.
        if mask is not None and mask.shape == valid.shape and not self.is_encoder_decoder:
            valid = valid & (mask != 0)
        student, teacher, count = student[valid].float(), teacher[valid].float(), valid.sum()
        total = (student - teacher).square().sum() if student.shape[-1] == 1 else self._divergence(student, teacher)
        if labels is not None and not fits:  # the Trainer averages over the labels
            labelled = (labels != -100).sum()
            total, count = total / count.clamp_min(1) * labelled, labelled
        return total, count

    def _span_distance(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        student, teacher = student.float(), teacher.float()
        if mask is not None and mask.shape == student.shape:
            lowest = torch.finfo(student.dtype).min / 2  # -inf would make the divergence NaN
            student, teacher = (logits.masked_fill(~mask.bool(), lowest) for logits in (student, teacher))
        return self._divergence(student, teacher)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``T**2 * KL(teacher || student)`` over the last dimension, summed over the others."""
        temperature = self.config.distill_temperature
        log_student, log_teacher = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
        return temperature**2 * nn.functional.kl_div(log_student, log_teacher, log_target=True, reduction="sum")


def _in_bfloat16(model: nn.Module) -> nn.Module:
    """A copy as `from_pretrained(dtype=torch.bfloat16)` makes it: buffers that are not saved, such as the frequencies
    of rotary embeddings, keep their precision, without which long texts get wrong positions."""
    teacher = copy.deepcopy(model).to(torch.bfloat16)
    for copied, module in zip(teacher.modules(), model.modules()):
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            copied._buffers[name] = None if buffer is None else buffer.clone()
    return teacher


def logits_of(outputs: dict[str, Tensor]) -> list[Tensor]:
    """The logits in a model's outputs that [`Distiller`] can compare; an empty list where there are none."""
    names = ("logits",) if "logits" in outputs else _SPAN_LOGITS
    return [outputs[name] for name in names if isinstance(outputs.get(name), Tensor)]


def _square_head(inputs: dict[str, Tensor], ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
    name, mask = "hidden_states", inputs.get("attention_mask")
    if name not in ours:
        name, labels = "decoder_hidden_states", inputs.get("labels")
        if labels is not None and labels.dim() == 2:  # of text: the attention mask is that of the encoder's inputs
            mask = labels != -100
    total = 0.0
    for student, teacher in zip(ours[name][1:], theirs[name][1:]):
        teacher = teacher.float()
        if mask is not None and mask.shape == student.shape[:2]:
            student, teacher = student[mask.bool()], teacher[mask.bool()]
        # Each token by its own norm, over all of them: a language model's first token has nearly all of the sum.
        distance = (student.float() - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)
        total = total + distance.mean()
    return total / (len(ours[name]) - 1)
