"""What the driver's own library, NVML, says of the machine's GPUs: how much of their memory is free, and who uses it.

Asking starts no CUDA context: it is done before torch touches a GPU, so that this process is not among its users yet.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

MPS_SERVER = "nvidia-cuda-mps-server"
"""A daemon through which processes share a GPU on purpose: it is nobody's job."""


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU; name and used_bytes are None where the driver does not tell them.

    In a container the driver may give the number that the process has outside, or none of the processes there.
    """

    pid: int
    name: str | None = None
    used_bytes: int | None = None

    def __str__(self) -> str:
        known = [self.name] if self.name else []
        known += [] if self.used_bytes is None else [f"{gib(self.used_bytes)} GiB"]
        return f"process {self.pid}" + (f" ({', '.join(known)})" if known else "")


@dataclass(frozen=True)
class Gpu:
    """A GPU, or one part of a GPU that is divided (MIG): `index` is the number that nvidia-smi has for it, or for the
    GPU of which it is a part; `uuid` is what CUDA_VISIBLE_DEVICES takes.

    unseen_bytes: memory in use of which no process is known. Where the driver does not tell its memory, all are 0.
    """

    index: int
    uuid: str
    name: str
    free_bytes: int = 0
    total_bytes: int = 0
    processes: tuple[GpuProcess, ...] = ()
    unseen_bytes: int = 0

    @property
    def is_part(self) -> bool:
        return self.uuid.startswith("MIG-")

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name}{', ' + self.uuid if self.is_part else ''})"


def gib(num_bytes: int) -> str:
    """Bytes in GiB, for people."""
    return f"{num_bytes / 2**30:.1f}"


def list_gpus() -> tuple[Gpu, ...] | None:
    """The GPUs that this process may use, in nvidia-smi's order; None where NVML is absent or does not answer.

    A GPU that does not even say its UUID, as one that is lost or another job's alone, is left out.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no library, no driver, no permission: whatever it is, it is NVML that is missing
        return None
    try:
        return tuple(_read_all(pynvml))
    except pynvml.NVMLError:
        return None
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _read_all(nvml: Any) -> Iterator[Gpu]:
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = _told(nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            continue
        for part in _parts(nvml, handle):
            gpu = _read(nvml, index, part)
            if gpu is not None:
                yield gpu


def _parts(nvml: Any, handle: Any) -> list[Any]:
    """The GPU itself, or the parts into which it is divided: then nothing runs on the whole of it."""
    mode = _told(nvml.nvmlDeviceGetMigMode, handle)
    if mode is None or not mode[0]:
        return [handle]
    most = _told(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
    parts = [_told(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place) for place in range(most)]
    return [part for part in parts if part is not None]


def _read(nvml: Any, index: int, handle: Any) -> Gpu | None:
    uuid = _told(nvml.nvmlDeviceGetUUID, handle)
    if uuid is None:
        return None
    free, total, used = _memory(nvml, handle)
    computing = _processes(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle)
    drawing = _processes(nvml, nvml.nvmlDeviceGetGraphicsRunningProcesses, handle)
    known = {process.pid: process.used_bytes for process in (*drawing, *computing)}
    in_the_dark = any(size is None for size in known.values())
    return Gpu(
        index=index,
        uuid=_text(uuid),
        name=_text(_told(nvml.nvmlDeviceGetName, handle) or "unnamed"),
        free_bytes=free,
        total_bytes=total,
        processes=tuple(one for one in computing if PurePath(one.name or "").name != MPS_SERVER),
        unseen_bytes=0 if in_the_dark else max(0, used - sum(size or 0 for size in known.values())),
    )


def _memory(nvml: Any, handle: Any) -> tuple[int, int, int]:
    """Free, total and used bytes. The second version of the call does not count what the driver keeps for itself."""
    info = _told(nvml.nvmlDeviceGetMemoryInfo, handle, getattr(nvml, "nvmlMemory_v2", None))
    info = info or _told(nvml.nvmlDeviceGetMemoryInfo, handle)
    return (0, 0, 0) if info is None else (int(info.free), int(info.total), int(info.used))


def _processes(nvml: Any, listing: Callable[..., Any], handle: Any) -> list[GpuProcess]:
    found = _told(listing, handle) or []
    return [GpuProcess(one.pid, _process_name(nvml, one.pid), one.usedGpuMemory) for one in found]


def _process_name(nvml: Any, pid: int) -> str | None:
    name = _told(nvml.nvmlSystemGetProcessName, pid)
    return textwrap.shorten(_text(name), 60, placeholder="...") if name else None


def _text(value: str | bytes) -> str:
    """Older versions of NVML's Python bindings give bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _told(ask: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers; None where it refuses, knows nothing, or its library is older than its bindings."""
    try:
        return ask(*arguments)
    except Exception:  # its errors have several bases, and undecodable names are UnicodeDecodeError
        return None
