"""The threads in which files are looked at: decoders and disks work outside of Python's lock."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from stages.machine.cores import num_cores

MAX_THREADS = 16

CHUNK = 256
"""Tasks that wait in the pool at once: a million of them would cost a gigabyte."""


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """A pool with one thread a core; an error in the block cancels what has not begun."""
    pool = ThreadPoolExecutor(min(num_cores(), MAX_THREADS))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
