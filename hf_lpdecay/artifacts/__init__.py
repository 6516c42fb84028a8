"""What leaves the machine: models that are really smaller, and their way to the hub."""

from .hub import Push, push_to_hub
from .shrink import shrink


__all__ = ["Push", "push_to_hub", "shrink"]
