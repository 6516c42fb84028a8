"""Transformers' side: trainers and the callback that drives the decay."""

from .callbacks import SparsityCallback
from .checkpoints import last_whole_checkpoint
from .record import write_record
from .trainer import LpDecayMixin, LpDecaySeq2SeqTrainer, LpDecayTrainer


__all__ = [
    "LpDecayMixin",
    "LpDecaySeq2SeqTrainer",
    "LpDecayTrainer",
    "SparsityCallback",
    "last_whole_checkpoint",
    "write_record",
]
