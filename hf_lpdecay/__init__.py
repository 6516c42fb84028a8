"""Train Transformers models sparse with the decoupled p-norm weight decay of arXiv 2404.10824."""

from typing import TYPE_CHECKING

from ._lazy import attach


if TYPE_CHECKING:
    from .artifacts import pack, push_to_hub, shrink, trim_rank, unpack
    from .config import LpDecayConfig
    from .inference import load_sparse, to_semi_structured, to_sparse
    from .optim import LpAdamW, LpDecay
    from .sparsity import SparsityReport, measure_sparsity
    from .training import (
        LpDecayMixin,
        LpDecaySeq2SeqTrainer,
        LpDecayTrainer,
        Sparsifier,
        SparsityCallback,
        load_masked_lora,
        mask_lora,
        merge_sparse,
    )

_MODULES = {
    "artifacts": ("pack", "push_to_hub", "shrink", "trim_rank", "unpack"),
    "config": ("LpDecayConfig",),
    "evaluation": (),
    "inference": ("load_sparse", "to_semi_structured", "to_sparse"),
    "optim": ("LpAdamW", "LpDecay"),
    "sparsity": ("SparsityReport", "measure_sparsity"),
    "training": (
        "LpDecayMixin",
        "LpDecaySeq2SeqTrainer",
        "LpDecayTrainer",
        "Sparsifier",
        "SparsityCallback",
        "load_masked_lora",
        "mask_lora",
        "merge_sparse",
    ),
}
__getattr__, __dir__ = attach(__name__, _MODULES)

__all__ = [
    "LpAdamW",
    "LpDecay",
    "LpDecayConfig",
    "LpDecayMixin",
    "LpDecaySeq2SeqTrainer",
    "LpDecayTrainer",
    "Sparsifier",
    "SparsityCallback",
    "SparsityReport",
    "load_masked_lora",
    "load_sparse",
    "mask_lora",
    "measure_sparsity",
    "merge_sparse",
    "pack",
    "push_to_hub",
    "shrink",
    "to_semi_structured",
    "to_sparse",
    "trim_rank",
    "unpack",
]
