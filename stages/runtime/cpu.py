"""CPU cores that this process may use, its priority, and the CPU's name and features.

Cores are bounded by the affinity mask and by the quotas of control groups (version 2), which psutil does not read: a
container that may use two cores of a hundred sees all hundred, and as many threads would mostly wait for each other.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

import psutil

CPUINFO = Path("/proc/cpuinfo")

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""Linux's names of the instruction sets that decide how fast INT8 runs in onnxruntime.

Dot products of bytes are in avx512_vnni, avx_vnni, amx_int8 and, on ARM, in asimddp and i8mm; without one of them INT8
gains little.
"""


@cache
def num_cores() -> int:
    """Return the number of cores of this process, 1 or more, counted once; see `available_cores`."""
    return available_cores(os.environ)


def omp_num_threads(environ: Mapping[str, str]) -> int | None:
    """Return OMP_NUM_THREADS; None without it. torchrun sets it to 1 where it is unset: that default is ignored."""
    setting = re.match(r"\s*([1-9][0-9]{0,3})\s*(,|$)", environ.get("OMP_NUM_THREADS", ""))
    by_torchrun = "TORCHELASTIC_RUN_ID" in environ and setting is not None and setting[1] == "1"
    return int(setting[1]) if setting and not by_torchrun else None


def available_cores(environ: Mapping[str, str], root: Path = Path("/")) -> int:
    """Return the minimum of the affinity mask and the control groups' quotas, rounded up.

    LOCAL_WORLD_SIZE processes of torchrun share the cores; SLURM_CPUS_PER_TASK is the share of each task of srun. /proc
    and /sys are read below `root`.
    """
    quota = min(_quotas(root), default=math.inf)
    processes = _number(environ, "LOCAL_WORLD_SIZE")
    cores = min(affinity_cores(), quota)
    if processes > 1:
        # A process that is bound to cores of its own has a narrower mask than torchrun, and its share already.
        cores = min(cores, affinity_cores(os.getppid()) // processes, quota / processes)
    elif "SLURM_STEP_NUM_TASKS" in environ and (share := _number(environ, "SLURM_CPUS_PER_TASK")):
        cores = min(cores, share)
    return max(1, math.ceil(cores))


def lower_priority(nice: int) -> None:
    """Raise the nice value of every thread of this process to at least `nice`, 0 (no change) to 19. Never fails.

    Threads and processes that are started later inherit it; lowering it again takes privileges. Where the kernel groups
    processes by session (autogroup), the value only counts within the session, and across control groups only their
    weights do.
    """
    if nice <= 0:
        return
    # On Linux each thread has a nice value of its own; elsewhere 0 stands for the process.
    for thread in [thread.id for thread in psutil.Process().threads()] if psutil.LINUX else [0]:
        with suppress(OSError):  # the thread has ended
            if os.getpriority(os.PRIO_PROCESS, thread) < nice:
                os.setpriority(os.PRIO_PROCESS, thread, nice)


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """Return the CPU's model name, or at least the machine's architecture."""
    name = next(_cpuinfo_values(cpuinfo, "model name"), "")
    return name or platform.processor() or platform.machine() or "unknown CPU"


def cpu_features(cpuinfo: Path = CPUINFO) -> list[str]:
    """Return those of `FEATURES` that the first core has; none where there is no /proc/cpuinfo."""
    flags = [*_cpuinfo_values(cpuinfo, "flags"), *_cpuinfo_values(cpuinfo, "Features")]
    present = flags[0].split() if flags else []
    return [feature for feature in FEATURES if feature in present]


@cache
def has_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    """Return whether the CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, or ARM's bf16)."""
    flags = [*_cpuinfo_values(cpuinfo, "flags"), *_cpuinfo_values(cpuinfo, "Features")]
    return bool(flags) and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[0].split())


def cgroup_dirs(root: Path = Path("/")) -> Iterator[Path]:
    """Yield the folder of this process's control group (version 2), and those above it.

    In a container the path may be the one outside of it: then only the mount's own folder exists, the container's.
    """
    lines = _text(root / "proc/self/cgroup").splitlines()
    group = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    parts = [part for part in PurePosixPath(group).parts if part not in {"/", ".."}]
    for length in range(len(parts), -1, -1):
        yield (root / "sys/fs/cgroup").joinpath(*parts[:length])


def affinity_cores(pid: int = 0) -> int:
    """Return the number of cores in the affinity mask of a process; 0 is this one."""
    with suppress(OSError, AttributeError):  # the process has ended; not every system has masks
        return len(os.sched_getaffinity(pid))
    return os.cpu_count() or 1


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if re.fullmatch("[0-9]{1,6}", text) else 0


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quotas, in cores, of this process's control group and of its ancestors."""
    for folder in cgroup_dirs(root):
        words = _text(folder / "cpu.max").split()  # a quota and its period, in microseconds; or "max"
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[0]) and int(words[1]):
            yield int(words[0]) / int(words[1])


def _cpuinfo_values(cpuinfo: Path, key: str) -> Iterator[str]:
    """Yield the value of `key` for each core."""
    for line in _text(cpuinfo).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            yield value.strip()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
