"""How many CPU cores this process may use: those that its affinity mask leaves it, within its control group's quota.

A container that may use two cores of a hundred sees all hundred: as many threads would mostly wait for each other.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

CPU_FOLDERS = ("cpu", "cpu,cpuacct", "cpuacct,cpu")
"""What the cpu controller's folder is called under /sys/fs/cgroup (cgroup v1)."""


@cache
def num_cores() -> int:
    """The cores of this process, 1 or more: counted once. Each of several processes that torchrun or srun started on
    this machine has its share of them, as `cores_left` says.
    """
    return cores_left(os.environ)


def num_threads(environ: Mapping[str, str]) -> int:
    """CPU threads of each operation where the recipe does not say: OMP_NUM_THREADS, else this process's cores.

    torchrun sets OMP_NUM_THREADS to 1 of itself where nobody has set it; that is nobody's wish.
    """
    wished = re.match(r"\s*([1-9][0-9]{0,3})\s*(,|$)", environ.get("OMP_NUM_THREADS", ""))
    by_torchrun = "TORCHELASTIC_RUN_ID" in environ and wished is not None and wished[1] == "1"
    return int(wished[1]) if wished and not by_torchrun else num_cores()


def cores_left(environ: Mapping[str, str], root: Path = Path("/")) -> int:
    """The least of the affinity mask and the quotas of the control groups that this process is in, rounded up.

    LOCAL_WORLD_SIZE processes that torchrun started share what it may use, SLURM_CPUS_PER_TASK is the share of each
    that srun started. root: the folder below which /proc and /sys are read.
    """
    quota = min(_quotas(root), default=math.inf)
    processes = _number(environ, "LOCAL_WORLD_SIZE")
    cores = min(_affinity(0), quota)
    if processes > 1:
        # One that is bound to cores of its own has a narrower mask than torchrun, and its share already.
        cores = min(cores, _affinity(os.getppid()) // processes, quota / processes)
    elif "SLURM_STEP_NUM_TASKS" in environ and (share := _number(environ, "SLURM_CPUS_PER_TASK")):
        cores = min(cores, share)
    return max(1, math.ceil(cores))


def _affinity(pid: int) -> int:
    """How many cores the affinity mask of a process leaves it; 0 is this one."""
    with suppress(OSError, AttributeError):  # the process has ended; not every system has masks
        return len(os.sched_getaffinity(pid))
    return os.cpu_count() or 1


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if re.fullmatch("[0-9]{1,6}", text) else 0


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quotas, in cores, of the groups that this process is in, and of those that these are in."""
    for controllers, group in _groups(root):
        mount = root / "sys/fs/cgroup"
        if controllers == "":
            for folder in _upwards(mount, group):
                yield from _quota(_words(folder / "cpu.max"))
        elif "cpu" in controllers.split(","):
            for name in dict.fromkeys((controllers, *CPU_FOLDERS)):
                for folder in _upwards(mount / name, group):
                    yield from _quota(_words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"))


def _groups(root: Path) -> Iterator[tuple[str, str]]:
    """The controllers and the path of each group, as /proc/self/cgroup has them; version 2 has one, and no names."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, colon, group = rest.partition(":")
        if colon:
            yield controllers, group


def _upwards(mount: Path, group: str) -> Iterator[Path]:
    """The folder of a group and those above it. In a container the path may be that outside: then only the mount's own
    folder is there, and it is the container's.
    """
    parts = [part for part in PurePosixPath(group).parts if part not in {"/", ".."}]
    for length in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:length])


def _quota(words: list[str]) -> Iterator[float]:
    """Cores from a quota and its period, in microseconds; nothing where there is no limit: "max", or -1."""
    if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[0]) and int(words[1]):
        yield int(words[0]) / int(words[1])


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
