"""Users of a GPU: processes that compute on it, and jobs that have claimed it and not used it yet.

Of two jobs that start at once and see the same idle GPU, one gets the claim: a locked file in a folder that all users
of the machine share. It lasts until its process ends. Where files or locks are unavailable there is no claim: then only
the driver's list of a GPU's processes keeps two jobs apart.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from kdpipe.stages.runtime.gpu.nvml import Gpu, gib
from kdpipe.store.fs.lock import PROBE_S, Holder, read_holder, release, write_record

CLAIMS = Path("/tmp")
"""Not $TMPDIR, which is a folder per user or per job on many machines."""

UNSEEN_BYTES = 2**30
"""More memory in use than this, without a known process, means one that is not visible, as in a container.

An idle GPU has next to nothing in use, a desktop some hundred MiB; a CUDA context alone takes 300 to 600 MiB, so that a
process that has only just started may be overlooked.
"""

_claims: dict[Path, int] = {}
"""Descriptors of this process's claims, by file."""


def is_launched(environ: Mapping[str, str]) -> bool:
    """Return whether torchrun or srun started this process, with others of the same job."""
    return "LOCAL_RANK" in environ or "SLURM_STEP_NUM_TASKS" in environ  # only srun sets the latter


def gpu_user(gpu: Gpu, launched: bool) -> str | None:
    """Describe who else uses a GPU; None where it is idle.

    If this process was `launched` by torchrun or srun, other processes of the launcher are the same job.
    """
    others = [process for process in gpu.processes if is_foreign(process.pid, launched)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return f"{others[0]}{more}"
    if gpu.unseen_bytes > UNSEEN_BYTES:
        return f"a process that is not visible from here ({gib(gpu.unseen_bytes)} GiB of its memory are in use)"
    return None


def is_foreign(pid: int, launched: bool) -> bool:
    """Return whether a process is not part of this job.

    Ancestors and descendants of this process are part of it, zombies are ignored; a process of which nothing is known,
    such as one outside of a container, is foreign.
    """
    family = {os.getpid(), *_lineage(os.getpid())[1:2]} if launched else {os.getpid()}
    return not (_is_dead(pid) or is_ancestor(pid) or family & set(_lineage(pid)))


def is_ancestor(pid: int) -> bool:
    """Return whether this process was started by another one, such as a notebook, or by one that it started."""
    return pid in _lineage(os.getpid())[1:]


def claim_gpu(uuid: str, folder: Path = CLAIMS) -> Holder | None:
    """Claim a GPU for the life of this process, without waiting; returns the holder if another process has claimed it.

    A second claim by the same process succeeds.
    """
    path = _path(uuid, folder)
    if path in _claims:
        return None
    try:
        descriptor = _open(path)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(descriptor) if isinstance(error, BlockingIOError) else None  # else there are no locks
        os.close(descriptor)
        return holder
    with suppress(OSError):  # another user's file may be locked, but not written to
        if os.fstat(descriptor).st_nlink == 1:  # else it is a link to some other file
            write_record(descriptor)
    _claims[path] = descriptor
    return None


def release_gpu(uuid: str, folder: Path = CLAIMS) -> None:
    """Release this process's claim on a GPU, if any. The file stays: another process may be about to lock it."""
    descriptor = _claims.pop(_path(uuid, folder), None)
    if descriptor is not None:
        release(descriptor)


def _lineage(pid: int) -> list[int]:
    """Return a process and its ancestors, without process 1, from which all descend."""
    try:
        ancestors = [process.pid for process in psutil.Process(pid).parents()]
    except psutil.Error:
        ancestors = []
    return [number for number in (pid, *ancestors) if number > 1]


def _is_dead(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    except psutil.Error:
        return False


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


def _holder(descriptor: int) -> Holder:
    """Read the holder of a locked file; once more if it has only just been locked, and names none yet."""
    holder = read_holder(descriptor)
    if holder.pid:
        return holder
    time.sleep(PROBE_S)
    return read_holder(descriptor)
