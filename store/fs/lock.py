"""File locks that name their holder and are released by the kernel when it ends, so that none becomes stale.

A flock belongs to an open file, not to a process: two threads exclude each other as two processes do, and a forked
(not spawned) child keeps its parent's locks until it ends too, unless the parent releases them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kdpipe.store.errors import DISK_ERRORS, KdpipeError, explain, translate_os_errors
from kdpipe.store.fs.atomic_write import make_folders

JOB_ID_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")

PROBE_S = 0.05
"""Longer than the shared lock of a probe, such as `kdpipe status`, is held."""

RECORD_BYTES = 512
"""Bytes read of a lock file: more than any record has."""

MAX_OPEN_TRIES = 1000

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class LockedError(KdpipeError):
    """A folder or unit that another job is using."""


@dataclass(frozen=True)
class Holder:
    """The holder of a lock, by its own record; `age_s` counts from when it was acquired, by this machine's clock.

    pid is 0 where the record cannot be read, as in the moment between locking a file and writing to it.
    """

    host: str
    pid: int
    job_id: str | None
    age_s: float

    def __str__(self) -> str:
        if self.pid == 0:
            return "another job"
        job = f" (job {self.job_id})" if self.job_id else ""
        return f"process {self.pid} on {self.host}{job}, for {self.age_s:.0f} s"


@contextmanager
def exclusive(
    what: Path | str, lock: Path, wait: bool = False, check: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold the lock file `lock` on the folder `what`, which messages name, exclusively inside the block.

    `wait` is for short sections such as a change of a manifest, `check` for long ones: it is called again and again
    while another process holds the lock, and may raise to give up. With neither LockedError names the current holder.
    Raises KdpipeError where the file cannot be created or locked.
    """
    if check is not None:
        while isinstance(acquired := acquire(lock, fcntl.LOCK_EX | fcntl.LOCK_NB), Holder):
            check()
            time.sleep(PROBE_S)
        try:
            yield
        finally:
            release(acquired)
        return
    with _locked(what, lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB):
        yield


@contextmanager
def shared(what: Path | str, lock: Path) -> Iterator[None]:
    """Hold the lock file `lock` on the folder `what` together with other sharers inside the block.

    Raises as `exclusive` does, which is refused meanwhile, naming the most recent sharer.
    """
    with _locked(what, lock, fcntl.LOCK_SH | fcntl.LOCK_NB):
        yield


@contextmanager
def _locked(what: Path | str, lock: Path, operation: int) -> Iterator[None]:
    acquired = acquire(lock, operation)
    if isinstance(acquired, Holder):  # perhaps only a probe, such as `kdpipe status`
        time.sleep(PROBE_S)
        acquired = acquire(lock, operation)
    if isinstance(acquired, Holder):
        raise LockedError(f"{what} is in use by {acquired}; wait for it, or stop it first.")
    try:
        yield
    finally:
        release(acquired)


def acquire(path: Path, operation: int) -> int | Holder:
    """Lock the file at `path`, created if absent, and write this process's record to it.

    `operation` is fcntl.LOCK_EX or fcntl.LOCK_SH, each with | fcntl.LOCK_NB not to wait. Returns an open descriptor for
    `release`, or the current holder.
    """
    while True:
        with lock_errors(path), ExitStack() as on_failure:
            descriptor = _open(path)
            on_failure.callback(os.close, descriptor)
            if not try_lock(path, descriptor, operation):
                return read_holder(descriptor)
            if is_file_at(path, descriptor):
                write_record(descriptor)
                on_failure.pop_all()
                return descriptor
        # The previous holder removed the file between open and lock: the lock would guard nothing.


def try_lock(path: Path, descriptor: int, operation: int) -> bool:
    """Lock an open file; return False if another holds it. Raises KdpipeError if the file system has no locks."""
    with lock_errors(path):
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            return False
    return True


def release(descriptor: int) -> None:
    """Unlock and close. Closing alone would leave the lock with any child forked meanwhile."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def is_file_at(path: Path, descriptor: int) -> bool:
    """Return whether `path` still names the open file."""
    try:
        # Opened rather than stat'ed: network file systems revalidate a name only when it is opened.
        found = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        return os.path.samestat(os.fstat(found), os.fstat(descriptor))
    finally:
        os.close(found)


def read_holder(descriptor: int) -> Holder:
    """Read the record in an open lock file. Informational only: an unreadable one gives pid 0."""
    try:
        record = json.loads(os.pread(descriptor, RECORD_BYTES, 0))
        age_s = max(0.0, time.time() - float(record["since"]))
        job_id = None if record["job_id"] is None else str(record["job_id"])
        return Holder(str(record["host"]), int(record["pid"]), job_id, age_s)
    except (ValueError, TypeError, KeyError, OverflowError):
        return Holder(host="", pid=0, job_id=None, age_s=0.0)


def lock_holder(path: Path) -> Holder | None:
    """Return who has locked the file at `path`, exclusively or shared; None if it is free or this cannot be seen.

    The lock is tried for a moment on a read-only descriptor; jobs that find it taken look again.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        for kind in (fcntl.LOCK_SH, fcntl.LOCK_EX):  # the second may not work on a read-only descriptor, as on NFS
            if not try_lock(path, descriptor, kind | fcntl.LOCK_NB):
                return read_holder(descriptor)
    except (OSError, KdpipeError):
        return None
    else:
        return None
    finally:
        os.close(descriptor)  # releases the lock


def write_record(descriptor: int) -> None:
    """Write this process's record to its open lock file."""
    job_id = next((os.environ[name] for name in JOB_ID_VARIABLES if os.environ.get(name)), None)
    record = {"host": socket.gethostname(), "pid": os.getpid(), "job_id": job_id, "since": time.time()}
    os.ftruncate(descriptor, 0)  # first, so that a reader never sees the name of a previous holder
    os.pwrite(descriptor, json.dumps(record).encode(), 0)


def _open(path: Path) -> int:
    """Open a lock file, created if absent. Others may remove its folder at any time, so this retries."""
    for tries_left in reversed(range(MAX_OPEN_TRIES)):
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            if not tries_left:
                raise
        with suppress(FileExistsError):  # made by another process, and perhaps removed again
            make_folders([path.parent])
    raise AssertionError("the last try returns or raises")


def lock_errors(path: Path) -> AbstractContextManager[None]:
    """Translate an OSError on the lock file `path` into a KdpipeError."""

    def message(error: OSError) -> str:
        if error.errno in NO_LOCKS:
            return (
                f"the file system of {path.parent} does not support file locks ({error.strerror}), and without them "
                "two jobs could spoil each other's work: use a folder on another one."
            )
        what, advice = explain(error)
        if error.errno in DISK_ERRORS:
            return f"the lock file {path} cannot be used: {what}; {advice}."
        return f"the lock file {path} cannot be used ({what}): make {path.parent} a folder that you may write to."

    return translate_os_errors(message, KdpipeError)
