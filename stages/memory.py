"""How this process takes memory from the system and gives it back."""

from __future__ import annotations

import contextlib
import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""From glibc's <malloc.h>."""


def keep_freed_memory() -> None:
    """Let the allocator keep what tensors free, for the next step to take again.

    By default glibc returns every large block to the kernel and faults it in again, page by page, a step later: on a
    CPU that takes from a tenth to two fifths of a forward pass. What a process holds is then its peak. Elsewhere than
    with glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
