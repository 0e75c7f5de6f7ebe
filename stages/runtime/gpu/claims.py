"""Claims on GPUs: of two jobs that start at once and see the same idle GPU, one gets it.

A claim is a locked file in a folder that all users of the machine share. It lasts until its process ends, and only
kdpipe looks at it. Where files or locks are unavailable there is no claim: then only the driver's list of a GPU's
processes keeps two jobs apart.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kdpipe.store.fs.lock import JOB_ID_VARIABLES, RECORD_BYTES, Holder, read_holder, release

CLAIMS = Path("/tmp")
"""Not $TMPDIR, which is a folder per user or per job on many machines."""

NUM_READS, READ_INTERVAL_S = 5, 0.05
"""Number of attempts to read a claim's record that its holder has not written yet, and the time between them."""

_held: dict[Path, int] = {}
"""Descriptors of this process's claims, by file."""


@dataclass(frozen=True)
class Claimant:
    """The holder of a claim on a GPU; `is_sibling` where it is another process of the same job."""

    holder: Holder
    is_sibling: bool


def launcher(environ: Mapping[str, str]) -> str | None:
    """Return a name that the processes started together by torchrun, or srun, share; None without a launcher."""
    if "LOCAL_RANK" in environ:
        return f"torchrun {environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}"
    if "SLURM_STEP_NUM_TASKS" in environ:  # only srun sets it
        return f"srun {environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    return None


def claim_gpu(uuid: str, environ: Mapping[str, str], folder: Path = CLAIMS) -> Claimant | None:
    """Claim a GPU for the life of this process, without waiting; returns its holder where there is one already.

    A second claim by the same process succeeds.
    """
    path = _path(uuid, folder)
    if path in _held:
        return None
    try:
        descriptor = _open(path)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        claimant = _claimant(descriptor, environ)
        os.close(descriptor)
        return claimant
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    with suppress(OSError):  # another user's file that may be locked, but not written to
        _write_record(descriptor, environ)
    _held[path] = descriptor
    return None


def release_gpu(uuid: str, folder: Path = CLAIMS) -> None:
    """Release this process's claim on a GPU, if any. The file stays: another process may be about to lock it."""
    descriptor = _held.pop(_path(uuid, folder), None)
    if descriptor is not None:
        release(descriptor)


def _path(uuid: str, folder: Path) -> Path:
    return folder / f"kdpipe-{uuid.replace('/', '_')}.lock"


def _open(path: Path) -> int:
    """Open the lock file, creating it if absent.

    Linux refuses O_CREAT on another user's file in a folder like /tmp (fs.protected_regular), and a read-only file can
    still be locked.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    with suppress(FileExistsError):
        descriptor = os.open(path, flags | os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):
            os.fchmod(descriptor, 0o666)  # undoes the umask: other users must be able to write
        return descriptor
    try:
        return os.open(path, flags | os.O_RDWR)
    except PermissionError:
        return os.open(path, flags | os.O_RDONLY)


def _write_record(descriptor: int, environ: Mapping[str, str]) -> None:
    job_id = next((environ[name] for name in JOB_ID_VARIABLES if environ.get(name)), None)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        return  # another user made it a hard link to some other file
    record = {"host": socket.gethostname(), "pid": os.getpid(), "job_id": job_id, "since": time.time()}
    os.ftruncate(descriptor, 0)  # first: a reader sees an empty record, never a dead holder's
    os.pwrite(descriptor, json.dumps(record | {"launcher": launcher(environ)}).encode(), 0)


def _claimant(descriptor: int, environ: Mapping[str, str]) -> Claimant:
    """Return the holder of a locked file, from its record."""
    for _ in range(NUM_READS):
        holder = read_holder(descriptor)
        if holder.pid:
            break
        time.sleep(READ_INTERVAL_S)
    own = launcher(environ)
    return Claimant(holder, own is not None and _launcher_in(descriptor) == own)


def _launcher_in(descriptor: int) -> str | None:
    try:
        found = json.loads(os.pread(descriptor, RECORD_BYTES, 0)).get("launcher")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None
