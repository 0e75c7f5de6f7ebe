"""How this process takes memory from the system and gives it back, and how it is told that there is no more."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From glibc's <malloc.h>."""

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "ALLOC_FAILED")
"""What the messages of torch's errors have in common: its CPU allocators', CUDA's, and cuDNN's and cuBLAS's status."""


def keep_freed_memory() -> bool:
    """Let the allocator keep what tensors free, for the next step to take again.

    By default glibc returns every large block to the kernel and faults it in again, page by page, a step later: on a
    CPU that can take half of a forward pass (benchmarks/freed_memory.py). What a process holds is then its peak.
    Elsewhere than with glibc this does nothing. Returns whether the allocator took it.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, CUDA's (torch.OutOfMemoryError is a RuntimeError), or the CPU allocator's."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
