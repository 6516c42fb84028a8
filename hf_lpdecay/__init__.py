"""Train Transformers models sparse with the decoupled p-norm weight decay of arXiv 2404.10824."""

from .artifacts import pack, push_to_hub, shrink, to_semi_structured, trim_rank, unpack
from .config import LpDecayConfig
from .optim import LpAdamW, LpDecay
from .sparsity import SparsityReport, measure_sparsity
from .training import LpDecayMixin, LpDecaySeq2SeqTrainer, LpDecayTrainer, SparsityCallback, merge_sparse


__all__ = [
    "LpAdamW",
    "LpDecay",
    "LpDecayConfig",
    "LpDecayMixin",
    "LpDecaySeq2SeqTrainer",
    "LpDecayTrainer",
    "SparsityCallback",
    "SparsityReport",
    "measure_sparsity",
    "merge_sparse",
    "pack",
    "push_to_hub",
    "shrink",
    "to_semi_structured",
    "trim_rank",
    "unpack",
]
