"""Transformers' side: trainers and the callback that drives the decay."""

from .adapters import MergeCost, load_masked_lora, mask_lora, merge_cost, merge_sparse
from .callbacks import SparsityCallback
from .checkpoints import FullDiskError, last_whole_checkpoint, naming_a_full_disk
from .record import write_record
from .sparsifier import Sparsifier
from .trainer import LpDecayMixin, LpDecaySeq2SeqTrainer, LpDecayTrainer


__all__ = [
    "FullDiskError",
    "LpDecayMixin",
    "LpDecaySeq2SeqTrainer",
    "LpDecayTrainer",
    "MergeCost",
    "Sparsifier",
    "SparsityCallback",
    "last_whole_checkpoint",
    "load_masked_lora",
    "mask_lora",
    "merge_cost",
    "merge_sparse",
    "naming_a_full_disk",
    "write_record",
]
