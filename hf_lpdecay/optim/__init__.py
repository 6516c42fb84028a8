"""The arithmetic: an AdamW with the decoupled p-norm decay, and the decay around any optimizer. Knows torch only."""

from .adamw import LpAdamW
from .wrapper import LpDecay


__all__ = ["LpAdamW", "LpDecay"]
