"""Train Transformers models sparse with the decoupled p-norm weight decay of arXiv 2404.10824."""

from .config import LpDecayConfig
from .optim import LpAdamW, LpDecay
from .sparsity import SparsityReport, measure_sparsity
from .training import LpDecayMixin, LpDecaySeq2SeqTrainer, LpDecayTrainer, SparsityCallback


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
]
