"""Facts about the machine for `kdpipe env`: memory, GPUs, file systems and whether their locks work."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def memory() -> dict[str, int | None]:
    """Return bytes of this machine's memory, installed and available, and the limit of its control groups, if any."""
    from kdpipe.stages.runtime.memory import available_bytes, installed_bytes, limit_bytes

    return {"total_bytes": installed_bytes(), "available_bytes": available_bytes(), "limit_bytes": limit_bytes()}


def gpus() -> list[dict[str, str]]:
    """Return index, name, memory, driver and compute capability of each GPU; none without NVML."""
    from kdpipe.stages.runtime.gpu.nvml import gib, list_gpus

    return [
        {
            "index": str(gpu.index),
            "name": gpu.name,
            "memory.total": f"{gib(gpu.total_bytes)} GiB",
            "driver_version": gpu.driver_version,
            "compute_cap": gpu.compute_capability,
        }
        for gpu in list_gpus() or ()
    ]


def disks() -> list[dict[str, Any]]:
    """Return the folders that kdpipe writes to: role, path, type of file system, free bytes, and whether locks work.

    has_locks is None where the folder is not writable.
    """
    found = [("current folder", Path.cwd())]
    with suppress(Exception):  # errors of the staging area are reported where it is used
        from kdpipe.store.remote.staging_cache import default_staging_cache

        found.append(("staging area", default_staging_cache(os.environ).folder))
    found.append(("temporary files", Path(tempfile.gettempdir())))
    return [_disk(role, path) for role, path in found]


def _disk(role: str, path: Path) -> dict[str, Any]:
    there = next((one for one in (path, *path.parents) if one.is_dir()), Path("/"))
    try:
        free: int | None = shutil.disk_usage(there).free
    except OSError:
        free = None
    return {
        "what": role,
        "path": str(path),
        "type": file_system(there),
        "free_bytes": free,
        "has_locks": has_locks(there),
    }


def has_locks(folder: Path) -> bool | None:
    """Return whether flock works in a folder, tried on an unnamed file; None where the folder is not writable."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
    except OSError:
        return None
    return True


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Return the type of a path's file system, as in ext4, nfs4, overlay."""
    wanted, found = path.resolve(), [(0, "unknown")]
    with suppress(OSError, UnicodeDecodeError):
        for line in mounts.read_text().splitlines():
            before, _, after = line.partition(" - ")
            if len(before.split()) > 4 and after:
                point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code.group(1), 8)), before.split()[4]))
                if wanted.is_relative_to(point):  # of mounts on one point the last is on top
                    found.append((len(point.parts), after.split()[0]))
    return max(enumerate(found), key=lambda one: (one[1][0], one[0]))[1][1]
