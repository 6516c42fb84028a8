"""Distillation from the dense parent: keeps a model close to what it was while its weights go."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import LpDecayConfig


class Distiller:
    """A frozen teacher and the losses against it.

    Args:
        config (`LpDecayConfig`): With `distill` set.
        model (`PreTrainedModel`): The student, before it is trained; with `distill="self"` it is its own teacher.

    Raises:
        ValueError: If the teacher's vocabulary or number of labels is not the student's.
    """

    def __init__(self, config: LpDecayConfig, model: PreTrainedModel):
        self.config = config
        if config.distill == "self":
            self.teacher = copy.deepcopy(model).to(torch.bfloat16)
        else:
            self.teacher = type(model).from_pretrained(config.distill, dtype=torch.bfloat16)
        for name in ("vocab_size", "num_labels"):
            ours, theirs = getattr(model.config, name, None), getattr(self.teacher.config, name, None)
            if ours != theirs:
                raise ValueError(f"distill={config.distill!r} has {name}={theirs}, but the student has {ours}.")
        self.teacher.eval().requires_grad_(False)
        # A model that predicts the next token has logits one position ahead of its labels.
        self.shifts = model.get_output_embeddings() is not None and not model.config.is_encoder_decoder

    def loss(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The distance from the teacher, summed over the labelled positions.

        ``T**2 * KL(teacher || student)`` of the logits at temperature ``T`` (arXiv 1503.02531), plus
        `distill_hidden` times the normalised distance of the hidden states (SquareHead, arXiv 2310.06927).

        Args:
            inputs (`dict[str, torch.Tensor]`): The student's inputs, with `labels`.
            outputs (`dict[str, torch.Tensor]`): The student's outputs; with `hidden_states` if `distill_hidden` is
                not zero.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The sum, and the number of labelled positions.
        """
        device = outputs["logits"].device
        if self.teacher.device != device:
            self.teacher.to(device)
        labels = inputs["labels"]
        with torch.no_grad():
            given = {name: value for name, value in inputs.items() if name != "labels"}
            if self.teacher.config.is_encoder_decoder:
                given["labels"] = labels  # from which it makes the decoder's inputs
            theirs = self.teacher(**given, output_hidden_states=self.config.distill_hidden > 0)
        student, teacher = outputs["logits"], theirs["logits"]
        if self.shifts:
            student, teacher, labels = student[..., :-1, :], teacher[..., :-1, :], labels[..., 1:]
        valid = labels != -100
        temperature = self.config.distill_temperature
        log_student = (student[valid].float() / temperature).log_softmax(-1)
        log_teacher = (teacher[valid].float() / temperature).log_softmax(-1)
        total = temperature**2 * nn.functional.kl_div(log_student, log_teacher, log_target=True, reduction="sum")
        count = valid.sum()
        if self.config.distill_hidden:
            total = total + self.config.distill_hidden * count * _square_head(inputs, outputs, theirs)
        return total, count


def _square_head(inputs: dict[str, Tensor], ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
    name = "hidden_states" if "hidden_states" in ours else "decoder_hidden_states"
    total = 0.0
    for student, teacher in zip(ours[name][1:], theirs[name][1:]):
        teacher = teacher.float()
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape == student.shape[:2]:
            student, teacher = student[mask.bool()], teacher[mask.bool()]
        total = total + (student.float() - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12)
    return total / (len(ours[name]) - 1)
