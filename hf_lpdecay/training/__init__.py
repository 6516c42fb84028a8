"""Transformers' side: trainers and the callback that drives the decay."""

from .adapters import MergeCost, merge_cost, merge_sparse
from .callbacks import SparsityCallback
from .checkpoints import last_whole_checkpoint
from .record import write_record
from .trainer import LpDecayMixin, LpDecaySeq2SeqTrainer, LpDecayTrainer


__all__ = [
    "LpDecayMixin",
    "LpDecaySeq2SeqTrainer",
    "LpDecayTrainer",
    "MergeCost",
    "SparsityCallback",
    "last_whole_checkpoint",
    "merge_cost",
    "merge_sparse",
    "write_record",
]
