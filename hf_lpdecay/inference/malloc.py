"""glibc's allocator: when freed memory goes back to the system."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Have the memory of each tensor mapped by itself, so that the system has it back when the tensor is freed.

    glibc keeps freed memory for what is allocated next, of tensors below a limit that it raises to 32 MB as soon as
    one of that size was freed; so does this in the end. A limit of the user's own stays.
    """
    set_option = _function("mallopt") if "MALLOC_MMAP_THRESHOLD_" not in os.environ else None
    if set_option is not None:
        trim_memory()  # otherwise what is free is used first
        set_option(_M_MMAP_THRESHOLD, 1 << 16)
    try:
        yield
    finally:
        if set_option is not None:
            set_option(_M_MMAP_THRESHOLD, 32 << 20)
            set_option(_M_TRIM_THRESHOLD, 64 << 20)


def trim_memory() -> None:
    """Give memory that is free back to the system, which glibc does not do by itself for tensors below 32 MB."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
