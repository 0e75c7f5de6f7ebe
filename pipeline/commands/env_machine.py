"""What `kdpipe env` says of the machine: memory, GPUs by nvidia-smi, file systems and whether their locks work."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

GPU_FIELDS = ("index", "name", "memory.total", "driver_version", "compute_cap")
NVIDIA_SMI_S = 20.0


def memory() -> dict[str, int | None]:
    """Bytes of this machine's memory, in all and free, and the limit that a cgroup sets; None where unknown."""
    fields: dict[str, int] = {}
    with suppress(OSError, UnicodeDecodeError):
        found = re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        fields = {name: 1024 * int(number) for name, number in found}
    return {
        "total_bytes": fields.get("MemTotal"),
        "available_bytes": fields.get("MemAvailable"),
        "limit_bytes": _memory_limit(fields.get("MemTotal")),
    }


def _memory_limit(total: int | None) -> int | None:
    """The least that this process's cgroups (version 2) allow it, where that is less than there is."""
    limits = []
    with suppress(OSError, UnicodeDecodeError):
        group = next(
            (line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"), "/"
        )
        own = Path("/sys/fs/cgroup") / group.strip().lstrip("/")
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError):
                limits.append(int((folder / "memory.max").read_text()))
    least = min(limits, default=None)
    return least if least is not None and (total is None or least < total) else None


def gpus() -> list[dict[str, str]]:
    """Index, name, memory, driver and compute capability of each GPU, in the words of nvidia-smi; none without it."""
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=NVIDIA_SMI_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in said.stdout.splitlines()]
    return [dict(zip(GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(GPU_FIELDS)]


def disks() -> list[dict[str, Any]]:
    """The folders that kdpipe writes to from here: what each is, its file system's type, room, and whether locks work
    (None where it cannot be written).
    """
    found = [("current folder", Path.cwd())]
    with suppress(Exception):  # what is wrong with the staging area is said by what uses it
        from store.remote.staging_cache import default_staging_cache

        found.append(("staging area", default_staging_cache(os.environ).folder))
    found.append(("temporary files", Path(tempfile.gettempdir())))
    return [_disk(what, path) for what, path in found]


def _disk(what: str, path: Path) -> dict[str, Any]:
    there = next((one for one in (path, *path.parents) if one.is_dir()), Path("/"))
    try:
        free: int | None = shutil.disk_usage(there).free
    except OSError:
        free = None
    return {
        "what": what,
        "path": str(path),
        "type": file_system(there),
        "free_bytes": free,
        "has_locks": has_locks(there),
    }


def has_locks(folder: Path) -> bool | None:
    """Whether flock works in a folder: tried on a file that has no name. None where the folder cannot be written."""
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
    """The type of the file system on which a path lies, as in ext4, nfs4, overlay."""
    wanted, found = path.resolve(), [(0, "unknown")]
    with suppress(OSError, UnicodeDecodeError):
        for line in mounts.read_text().splitlines():
            before, _, after = line.partition(" - ")
            if len(before.split()) > 4 and after:
                point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code.group(1), 8)), before.split()[4]))
                if wanted.is_relative_to(point):  # of mounts on one point the last is on top
                    found.append((len(point.parts), after.split()[0]))
    return max(enumerate(found), key=lambda one: (one[1][0], one[0]))[1][1]
