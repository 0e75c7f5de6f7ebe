"""File locks: they die with their holder, however it ends, and say who it is. Nothing here ever goes stale.

flock is held by an open file, not by a process: two threads exclude each other as two processes do, and a child
that is forked (not spawned) keeps its parent's locks alive until it ends too, unless the parent lets go of them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from store.fs.atomic_write import make_folders
from store.errors import KdpipeError

JOB_ID_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
LOOK_S = 0.05
"""Longer than a look at a lock takes."""

RECORD_BYTES = 512
"""What is read of a lock file: more than any record has."""


class LockedError(KdpipeError):
    """Another job is at work in the folder."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, by its own record; `age_s` counts from when it took the lock, by this machine's clock.

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
def exclusive(what: Path | str, lock: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `lock` on the folder `what` exclusive_store while the block runs.

    Raises LockedError, naming the holder, if another has it; with `wait` it waits instead, however long, and is meant
    for a few lines such as a change of a manifest. Raises KdpipeError where the file cannot be made or locked.
    """
    with _held(what, lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB):
        yield


@contextmanager
def shared(what: Path | str, lock: Path) -> Iterator[None]:
    """Hold the lock file `lock` on the folder `what` together with others who share it, while the block runs.

    Raises LockedError while another holds it exclusive_store; `exclusive` is refused in turn, in the name of the last that came
    to share. Raises KdpipeError where the file cannot be made or locked.
    """
    with _held(what, lock, fcntl.LOCK_SH | fcntl.LOCK_NB):
        yield


@contextmanager
def _held(what: Path | str, lock: Path, operation: int) -> Iterator[None]:
    taken = acquire(lock, operation)
    if isinstance(taken, Holder):  # perhaps only by somebody who was just looking, as `kdpipe status` does
        time.sleep(LOOK_S)
        taken = acquire(lock, operation)
    if isinstance(taken, Holder):
        raise LockedError(f"{what} is in use by {taken}; wait for it, or stop it first.")
    try:
        yield
    finally:
        release(taken)


def acquire(path: Path, operation: int) -> int | Holder:
    """Lock the file at `path`, made if absent: its open descriptor, for `release`, or who has it.

    operation: fcntl.LOCK_EX or fcntl.LOCK_SH, each with | fcntl.LOCK_NB to be refused rather than wait.
    Raises KdpipeError where the file cannot be made or its file system has no locks.
    """
    while True:
        with explained(path), ExitStack() as unless_taken:
            descriptor = _open(path)
            unless_taken.callback(os.close, descriptor)
            if not try_lock(path, descriptor, operation):
                return read_holder(descriptor)
            if is_file_at(path, descriptor):
                _write_record(descriptor)
                unless_taken.pop_all()
                return descriptor
        # Its last holder removed the file between our opening and our locking it: that lock guards nothing.


def try_lock(path: Path, descriptor: int, operation: int) -> bool:
    """Lock an open file; False if another has it. Raises KdpipeError if the file system of `path` has no locks."""
    with explained(path):
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            return False
    return True


def release(descriptor: int) -> None:
    """Unlock and close. Closing exclusive_store would leave the lock with any child that was forked meanwhile."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def is_file_at(path: Path, descriptor: int) -> bool:
    """Whether `path` still names the open file."""
    try:
        # Opened, not stat'ed: network file systems ask the server for the name only when a file is opened.
        found = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        return os.path.samestat(os.fstat(found), os.fstat(descriptor))
    finally:
        os.close(found)


def read_holder(descriptor: int) -> Holder:
    """The record in an open lock file. It is for people to read: a broken one is no error."""
    try:
        record = json.loads(os.pread(descriptor, RECORD_BYTES, 0))
        age_s = max(0.0, time.time() - float(record["since"]))
        job_id = None if record["job_id"] is None else str(record["job_id"])
        return Holder(str(record["host"]), int(record["pid"]), job_id, age_s)
    except (ValueError, TypeError, KeyError, OverflowError):
        return Holder(host="", pid=0, job_id=None, age_s=0.0)


def _write_record(descriptor: int) -> None:
    job_id = next((os.environ[name] for name in JOB_ID_VARIABLES if os.environ.get(name)), None)
    record = {"host": socket.gethostname(), "pid": os.getpid(), "job_id": job_id, "since": time.time()}
    os.ftruncate(descriptor, 0)  # first: whoever looks now reads nothing, and never a dead holder's name
    os.pwrite(descriptor, json.dumps(record).encode(), 0)


def _open(path: Path) -> int:
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # again and again: the last to release a claim removes the folder
            try:
                make_folders([path.parent])
            except FileExistsError:  # it was there when it was to be made, and was gone when pathlib looked
                if not _may_be_folder(path.parent):
                    raise


def _may_be_folder(path: Path) -> bool:
    """Whether a folder is at `path`, or nothing: at one look, as it may come and go."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return True


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}:
            raise KdpipeError(
                f"the file system of {path.parent} does not support file locks ({error.strerror}), and without them "
                "two jobs could spoil each other's work: use a folder on another one."
            ) from None
        raise KdpipeError(
            f"the lock file {path} cannot be used ({error.strerror}): make {path.parent} a folder that you may "
            "write to, or use another."
        ) from None
