"""Locks beside a store: one for changes of its metadata, and claims of units by the processes that fill it.

A claim is a locked file `.{store name}.locks/{unit}`. The kernel drops a dead process's lock, so its claim is free at
once, without timeouts. Claims only save double work: two writers of one unit write the same bytes.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from kdpipe.store.fs.lock import (
    Holder,
    LockedError,
    acquire,
    exclusive,
    is_file_at,
    lock_errors,
    read_holder,
    release,
    try_lock,
)

__all__ = ["Claim", "Holder", "claim", "claimed", "exclusive_store", "holder"]


def exclusive_store(path: Path, check: Callable[[], None] | None = None) -> AbstractContextManager[None]:
    """Hold the lock for changes of the metadata of the store at `path`, and wait for it; `check` as in `exclusive`.

    The lock file is beside the store, so that plain Zarr sees a valid group inside.
    """
    return exclusive(path, _beside(path, "lock"), wait=True, check=check)


class Claim:
    """A unit claimed by this process until `release`, or until the process ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor: int | None = descriptor
        self._releasing = threading.Lock()

    def release(self) -> None:
        """Release the unit and remove the lock file. Thread-safe; a second call does nothing."""
        with self._releasing:
            if self._descriptor is None:
                return
            descriptor, self._descriptor = self._descriptor, None
        # Removed while still locked: a process that locks this file later sees that its name is gone, and starts over.
        with suppress(OSError):  # a file that cannot be removed is not a claim
            if is_file_at(self._path, descriptor):
                self._path.unlink()
        release(descriptor)
        with suppress(OSError):  # not empty, or already removed
            self._path.parent.rmdir()


def claim(store: Path, name: str) -> Claim | Holder:
    """Claim the unit `name` of the store at `store`, or return its holder, which may be this process. Never waits.

    Raises KdpipeError where the folder cannot be written, or its file system has no locks.
    """
    path = _path(store, name)
    while True:
        acquired = acquire(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if isinstance(acquired, int):
            return Claim(path, acquired)
        if found := holder(store, name):  # else refused only because of a probe by another `holder` call
            return found


@contextmanager
def claimed(store: Path, name: str, message: Callable[[Holder], str]) -> Iterator[None]:
    """Claim the unit `name` inside the block. Raises LockedError with `message(holder)` if another has it."""
    acquired = claim(store, name)
    if isinstance(acquired, Holder):
        raise LockedError(message(acquired))
    try:
        yield
    finally:
        acquired.release()


def holder(store: Path, name: str) -> Holder | None:
    """Return the process that has claimed the unit `name`; None if there is none, or only the file of a killed one.

    Works on a read-only disk: it takes a shared lock for a moment, because of which `claim` is never refused.
    """
    path = _path(store, name)
    with lock_errors(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
    try:
        if try_lock(path, descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB):
            return None
        return read_holder(descriptor)
    finally:
        release(descriptor)


def _path(store: Path, name: str) -> Path:
    return _beside(store, "locks") / name


def _beside(store: Path, suffix: str) -> Path:
    """Return the hidden path beside a store, which may be given as "." or "..", with no name of its own."""
    named = store if store.name not in ("", "..") else store.resolve()
    return named.with_name(f".{named.name}.{suffix}")
