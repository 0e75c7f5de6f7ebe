"""One job at a time in a folder: an advisory lock that dies with its holder and says who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from store.durable import make_folders
from store.errors import KdpipeError


class LockedError(KdpipeError):
    """Another job is at work in the folder."""


@contextmanager
def exclusive(what: Path, lock: Path) -> Iterator[None]:
    """Hold the lock file `lock` on the folder `what` while the block runs.

    The kernel lets go of it when the process ends, however it ends: there are no stale locks to clear.
    Raises LockedError, naming the holder, if another process has it.
    """
    make_folders([lock.parent])
    with lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(f"{what} is in use by {_holder(lock)}; wait for it, or stop it first.") from None
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        yield


def _holder(lock: Path) -> str:
    try:
        record = json.loads(lock.read_text(encoding="utf-8"))
        return f"process {record['pid']} on {record['host']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another job"
