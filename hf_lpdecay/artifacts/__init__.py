"""What leaves the machine: models that are really smaller, and their way to the hub."""

from .archive import pack, unpack
from .csr import to_sparse_csr
from .hub import Push, push_to_hub
from .rank import trim_rank
from .semi_structured import to_semi_structured
from .shrink import shrink


__all__ = ["Push", "pack", "push_to_hub", "shrink", "to_semi_structured", "to_sparse_csr", "trim_rank", "unpack"]
