"""The arithmetic: an AdamW with the decoupled p-norm decay. Knows torch only."""

from .adamw import LpAdamW


__all__ = ["LpAdamW"]
