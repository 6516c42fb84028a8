"""What leaves the machine: models that are really smaller, and their way to the hub."""

from .archive import pack, unpack
from .hub import Push, push_to_hub
from .rank import trim_rank
from .shrink import shrink


__all__ = ["Push", "pack", "push_to_hub", "shrink", "trim_rank", "unpack"]
