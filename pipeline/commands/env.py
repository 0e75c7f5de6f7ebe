"""Describe versions and machine for a public bug report.

No host name, no user name, no variable that is not listed here. torch is not imported and no GPU is used.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import runpy
import shutil
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kdpipe.pipeline.terminal.output import printable
from kdpipe.stages.runtime.versions import NAME, commit, versions
from kdpipe.store.redact import redacted

VARIABLES = re.compile(
    "CUDA_VISIBLE_DEVICES|CUDA_DEVICE_ORDER|CUDA_LAUNCH_BLOCKING|CUBLAS_WORKSPACE_CONFIG|NVIDIA_VISIBLE_DEVICES"
    "|PYTORCH_(CUDA_)?ALLOC_CONF|TORCH_(NUM_THREADS|ALLOW_TF32_CUBLAS_OVERRIDE|NCCL_[A-Z_]+)|NCCL_(DEBUG|P2P_DISABLE|IB_DISABLE)"
    "|(OMP|MKL|OPENBLAS|NUMEXPR)_NUM_THREADS|OMP_(WAIT_POLICY|PROC_BIND|PLACES)|MALLOC_[A-Z_]+|LD_PRELOAD"
    "|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|TORCHELASTIC_RESTART_COUNT"
    "|SLURM_(JOB_ID|PROCID|LOCALID|NODEID|NTASKS|NNODES|STEP_NUM_TASKS|CPUS_PER_TASK|CPUS_ON_NODE|MEM_PER_NODE|MEM_PER_CPU"
    "|GPUS|GPUS_ON_NODE|GPUS_PER_TASK|GPUS_PER_NODE|RESTART_COUNT|ARRAY_(JOB_ID|TASK_(ID|MIN|MAX|STEP|COUNT)))"
    "|KDPIPE_[A-Z0-9_]+|PYTHON(HASHSEED|OPTIMIZE|UTF8|WARNINGS)|LANG|LC_ALL|TERM|TMPDIR|XDG_CACHE_HOME"
)
"""Environment variables that are shown; of others not even the name."""

MAX_TEXT = 200


def read_env() -> dict[str, Any]:
    """Return all information as JSON."""
    head, dirty = commit()
    return {
        "command": "env",
        NAME: {"version": versions().get(NAME), "commit": head, "dirty": dirty},
        "python": {"version": platform.python_version(), "from": private(sys.executable)},
        "system": _system(),
        "cpu": _cpu(),
        "memory": _memory(),
        "torch": _torch(),
        "gpus": gpus(),
        "packages": {name: version for name, version in versions().items() if name != NAME},
        "variables": {name: private(value) for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)},
        "disks": _disks(),
    }


def private(text: str) -> str:
    """Remove home folder, user name, URL credentials and control characters from a text, and shorten it."""
    text = redacted(text)
    home = os.environ.get("HOME") or ""
    if len(home) > 1:
        text = re.sub(rf"(?<![\w/]){re.escape(home.rstrip('/'))}(?=/|$|:)", "~", text)
    user = os.environ.get("USER") or os.environ.get("LOGNAME") or ""
    if user and user != "root":
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(user)}(?![A-Za-z0-9])", "USER", text)
    return printable(text[:MAX_TEXT])


def print_env(env: dict[str, Any]) -> None:
    """Print the information to stdout."""
    for name, text in _lines(env):
        print(printable(f"{name:<10} {text}"))  # noqa: T201


def _lines(env: dict[str, Any]) -> list[tuple[str, str]]:
    own, cpu, memory, torch = env[NAME], env["cpu"], env["memory"], env["torch"]
    source = f"commit {own['commit'][:12]}{', modified' if own['dirty'] else ''}" if own["commit"] else "not a checkout"
    limit = memory["limit_bytes"]
    lines = [
        (NAME, f"{own['version'] or 'not installed'}, {source}"),
        ("python", f"{env['python']['version']} at {env['python']['from']}"),
        ("system", ", ".join(str(text) for text in env["system"].values() if text)),
        ("cpu", f"{cpu['model']}: {cpu['online']} cores, {cpu['allowed']} allowed, {cpu['used']} used"),
        (
            "memory",
            f"{_gib(memory['total_bytes'])}, {_gib(memory['available_bytes'])} free"
            + (f", limit {_gib(limit)}" if limit else ""),
        ),
        ("torch", f"{torch['version']}, CUDA {torch['cuda'] or 'none'}, cuDNN {torch['cudnn'] or 'none'}"),
        *[("gpu", ", ".join(filter(None, gpu.values()))) for gpu in env["gpus"]],
    ]
    lines += [("gpu", "none found by NVML")] if not env["gpus"] else []
    lines += [("packages", ", ".join(f"{name} {version or 'absent'}" for name, version in env["packages"].items()))]
    lines += [("variable", f"{name}={value}") for name, value in env["variables"].items()]
    return lines + [("disk", _disk(disk)) for disk in env["disks"]]


def _disk(disk: dict[str, Any]) -> str:
    locks = {True: "locks work", False: "NO file locks", None: "not writable"}[disk["has_locks"]]
    return f"{disk['what']}: {disk['path']}, {disk['type']}, {_gib(disk['free_bytes'])} free, {locks}"


def _gib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 2**30:,.1f} GiB"


def _system() -> dict[str, str]:
    try:
        release = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        release = ""
    found = platform.uname()
    return {
        "distribution": release,
        "kernel": f"{found.system} {found.release}",
        "machine": found.machine,
        "libc": " ".join(platform.libc_ver()).strip(),
    }


def _cpu() -> dict[str, Any]:
    from kdpipe.stages.runtime.cpu import cpu_name, num_cores

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": cpu_name(), "online": os.cpu_count(), "allowed": allowed, "used": num_cores()}


def _torch() -> dict[str, str | None]:
    """Return the versions torch was built with, from its version.py: importing torch takes seconds."""
    spec, built = find_spec("torch"), {}
    if spec and spec.origin:
        with suppress(Exception):
            built = runpy.run_path(str(Path(spec.origin).parent / "version.py"))
    cudnn = next(filter(None, map(_package_version, ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"))), None)
    found = {"version": built.get("__version__"), "cuda": built.get("cuda"), "hip": built.get("hip"), "cudnn": cudnn}
    return {name: None if text is None else str(text) for name, text in found.items()}


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory() -> dict[str, int | None]:
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


def _disks() -> list[dict[str, Any]]:
    """Return role, path, file system, free bytes and locks of the folders that kdpipe writes to."""
    found = [("current folder", Path.cwd())]
    with suppress(Exception):  # errors of the staging area are reported where it is used
        from kdpipe.store.remote.staging_cache import default_staging_cache

        found.append(("staging area", default_staging_cache(os.environ).folder))
    found.append(("temporary files", Path(tempfile.gettempdir())))
    return [_disk_info(role, path) for role, path in found]


def _disk_info(role: str, path: Path) -> dict[str, Any]:
    existing = next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))
    try:
        free: int | None = shutil.disk_usage(existing).free
    except OSError:
        free = None
    return {
        "what": role,
        "path": private(str(path)),
        "type": file_system(existing),
        "free_bytes": free,
        "has_locks": has_locks(existing),
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


def file_system(path: Path) -> str:
    """Return the type of a path's file system, as in ext4, nfs4, overlay."""
    import psutil

    mounts = [mount for mount in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else "unknown"
