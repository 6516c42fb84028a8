"""What leaves the machine: models that are really smaller."""

from .shrink import shrink


__all__ = ["shrink"]
