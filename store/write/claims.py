"""Claims: several processes fill one store, and each unit is claimed by one of them at a time.

A claim is a locked file beside the store, `.{store name}.locks/{unit}`. The kernel drops a dead process's lock, so its
claim is free at once, without timeouts. Claims only save double work: two writers of one unit write the same bytes.
"""

from __future__ import annotations

import fcntl
import os
import threading
from contextlib import suppress
from pathlib import Path

from store.fs.lock import Holder, explained, is_file_at, release, read_holder, acquire, try_lock

__all__ = ["Claim", "Holder", "claim", "holder"]


class Claim:
    """A unit that is this process's exclusive_store until `release`, or until the process ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor: int | None = descriptor
        self._releasing = threading.Lock()

    def release(self) -> None:
        """Let others claim the unit, and leave no file behind. From any thread; a second call does nothing."""
        with self._releasing:
            if self._descriptor is None:
                return
            descriptor, self._descriptor = self._descriptor, None
        # Removed while still locked: whoever locks this file later sees that its name is gone, and starts afresh.
        with suppress(OSError):  # a file that cannot be removed is litter, no claim
            if is_file_at(self._path, descriptor):
                self._path.unlink()
        release(descriptor)
        with suppress(OSError):  # other claims are in it, or another process has removed it already
            self._path.parent.rmdir()


def claim(store: Path, name: str) -> Claim | Holder:
    """Claim the unit `name` of the store at `store`, or learn who is at it. Never waits.

    What a killed process had claimed is simply claimed anew. A process that has a claim is refused a second one like
    any other. Raises KdpipeError where the folder cannot be written or its file system has no locks.
    """
    path = _path(store, name)
    while True:
        taken = acquire(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if isinstance(taken, int):
            return Claim(path, taken)
        # Refused, but perhaps only by a process that was just looking, as `holder` does.
        if at_it := holder(store, name):
            return at_it


def holder(store: Path, name: str) -> Holder | None:
    """Who is at the unit `name` now; None where no living process is, as when a killed one left its file.

    Looking takes a shared lock for a moment and writes nothing, so a store on a read-only disk can be looked at;
    `claim` tells such a look from a claim, and is never refused because of one.
    """
    path = _path(store, name)
    with explained(path):
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
    return store.with_name(f".{store.name}.locks") / name
