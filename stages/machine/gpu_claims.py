"""Claims on GPUs. Two jobs that start at once both see the same idle GPU, as neither has touched it: one gets it.

A claim is a locked file in a folder that all users of the machine share. It lasts until its process ends, however that
ends, and is seen by kdpipe alone. Where it cannot be had for want of a file or of locks, there simply is none: then
only what the driver says of a GPU's users stands between two jobs.
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

from store.fs.lock import JOB_ID_VARIABLES, RECORD_BYTES, Holder, read_holder, release

CLAIMS = Path("/tmp")
"""Not $TMPDIR, which is each user's own, or each job's, on many machines."""

NUM_LOOKS, LOOK_S = 5, 0.05
"""How often, and how far apart, a claim's record is looked at that its holder has not written yet."""

_held: dict[Path, int] = {}
"""Descriptors of the claims that this process holds, by file."""


@dataclass(frozen=True)
class Claimant:
    """Who has claimed a GPU; `is_sibling` where that is another process of this very job."""

    holder: Holder
    is_sibling: bool


def launcher(environ: Mapping[str, str]) -> str | None:
    """What the processes have in common that torchrun, or srun, started together; None where neither did."""
    if "LOCAL_RANK" in environ:
        return f"torchrun {environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}"
    if "SLURM_STEP_NUM_TASKS" in environ:  # only srun sets it
        return f"srun {environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    return None


def claim_gpu(uuid: str, environ: Mapping[str, str], folder: Path = CLAIMS) -> Claimant | None:
    """Claim a GPU for as long as this process lives; returns who has it already, None where nobody has. Never waits.

    A second claim of the same process finds the first one.
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
    """Give up this process's claim on a GPU, if it has one. The file stays: another may be about to lock it."""
    descriptor = _held.pop(_path(uuid, folder), None)
    if descriptor is not None:
        release(descriptor)


def _path(uuid: str, folder: Path) -> Path:
    return folder / f"kdpipe-{uuid.replace('/', '_')}.lock"


def _open(path: Path) -> int:
    """Open the lock file, made if absent. Linux refuses O_CREAT on another user's file in a folder like /tmp
    (fs.protected_regular), and a file that others may not write to can still be locked.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    with suppress(FileExistsError):
        descriptor = os.open(path, flags | os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):
            os.fchmod(descriptor, 0o666)  # the umask took others' permission to write
        return descriptor
    try:
        return os.open(path, flags | os.O_RDWR)
    except PermissionError:
        return os.open(path, flags | os.O_RDONLY)


def _write_record(descriptor: int, environ: Mapping[str, str]) -> None:
    job_id = next((environ[name] for name in JOB_ID_VARIABLES if environ.get(name)), None)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        return  # in a folder where everybody may write, somebody made it something else's second name
    record = {"host": socket.gethostname(), "pid": os.getpid(), "job_id": job_id, "since": time.time()}
    os.ftruncate(descriptor, 0)  # first: whoever looks now reads nothing, and never a dead holder's name
    os.pwrite(descriptor, json.dumps(record | {"launcher": launcher(environ)}).encode(), 0)


def _claimant(descriptor: int, environ: Mapping[str, str]) -> Claimant:
    """Who holds a locked file, by its record."""
    for _ in range(NUM_LOOKS):
        holder = read_holder(descriptor)
        if holder.pid:
            break
        time.sleep(LOOK_S)
    own = launcher(environ)
    return Claimant(holder, own is not None and _launcher_in(descriptor) == own)


def _launcher_in(descriptor: int) -> str | None:
    try:
        found = json.loads(os.pread(descriptor, RECORD_BYTES, 0)).get("launcher")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None
