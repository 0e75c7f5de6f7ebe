"""GPUs of this machine as the driver's library, NVML, lists them, and those that CUDA_VISIBLE_DEVICES names.

NVML starts no CUDA context: it is asked before torch touches a GPU, so that this process is not among its users yet.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

MPS_SERVER = "nvidia-cuda-mps-server"
"""A daemon through which processes share a GPU on purpose: it counts as no user."""

VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"

PROHIBITED, EXCLUSIVE = 2, 3
"""NVML's numbers of the compute modes in which no process, or only one, may use a GPU."""


@dataclass(frozen=True)
class GpuProcess:
    """A process that computes on a GPU; name and used_bytes are None where the driver does not report them.

    In a container the driver may report the process's number outside of it, or no process at all.
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
    """A GPU, or an instance of a divided GPU (MIG).

    Attributes:
        index: nvidia-smi's number of it, or of the GPU that it is an instance of.
        uuid: Its name in CUDA_VISIBLE_DEVICES.
        free_bytes: Free memory; where the driver does not report memory, all sizes are 0.
        unseen_bytes: Memory in use, where the driver lists no process.
        compute_mode: NVML's number of it; 0 lets all processes use the GPU, as does an MPS server.
    """

    index: int
    uuid: str
    name: str
    free_bytes: int = 0
    total_bytes: int = 0
    processes: tuple[GpuProcess, ...] = ()
    unseen_bytes: int = 0
    driver_version: str = ""
    compute_capability: str = ""
    compute_mode: int = 0

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name}{', ' + self.uuid if self.uuid.startswith('MIG-') else ''})"


def gib(num_bytes: int) -> str:
    """Format bytes in GiB."""
    return f"{num_bytes / 2**30:.1f}"


def list_gpus() -> tuple[Gpu, ...] | None:
    """List the GPUs that this process may use, in nvidia-smi's order; None where NVML is absent or fails.

    A GPU that does not even report its UUID, such as one that is lost or reserved for another job, is left out.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no library, no driver, no permission: in any case NVML cannot be used
        return None
    try:
        return tuple(_read_all(pynvml))
    except pynvml.NVMLError:
        return None
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def visible_gpus(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> list[Gpu | None]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; all where it is unset.

    Entries are nvidia-smi's numbers, UUIDs and their beginnings (CUDA programming guide, environment variables). None
    stands for an ambiguous one. As for CUDA, the list ends at the first entry that names nothing.
    """
    if VISIBLE not in environ:
        return list(gpus)
    visible: list[Gpu | None] = []
    for entry in environ[VISIBLE].split(","):
        named = _named(entry.strip(), gpus)
        if not named:
            break
        visible.append(named[0] if len(named) == 1 else None)
    return visible


def _named(entry: str, gpus: Sequence[Gpu]) -> Sequence[Gpu | None]:
    """Return the GPUs that an entry of CUDA_VISIBLE_DEVICES may mean."""
    if entry.isdecimal():
        return [gpu for gpu in gpus if gpu.index == int(entry)]
    matching = [gpu for gpu in gpus if gpu.uuid.startswith(entry)] if entry.startswith(("GPU-", "MIG-")) else []
    # An instance can also be named by its GPU and two numbers, MIG-GPU-.../1/0: that form is not resolved.
    return matching or ([None] if entry.startswith("MIG-") else [])


def _read_all(nvml: Any) -> Iterator[Gpu]:
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = _query(nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            continue
        for instance in _instances(nvml, handle):
            gpu = _read(nvml, index, instance, handle)
            if gpu is not None:
                yield gpu


def _instances(nvml: Any, handle: Any) -> list[Any]:
    """Return the GPU itself, or the instances into which it is divided: then nothing runs on the whole of it."""
    mode = _query(nvml.nvmlDeviceGetMigMode, handle)
    if mode is None or not mode[0]:
        return [handle]
    count = _query(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
    instances = [_query(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number) for number in range(count)]
    return [instance for instance in instances if instance is not None]


def _read(nvml: Any, index: int, handle: Any, parent: Any) -> Gpu | None:
    uuid = _query(nvml.nvmlDeviceGetUUID, handle)
    if uuid is None:
        return None
    free, total, used = _memory(nvml, handle)
    computing = [
        GpuProcess(entry.pid, _process_name(nvml, entry.pid), entry.usedGpuMemory)
        for entry in _query(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []
    ]
    drawing = _query(nvml.nvmlDeviceGetGraphicsRunningProcesses, handle)
    capability = _query(getattr(nvml, "nvmlDeviceGetCudaComputeCapability", None), parent) or ()
    known = tuple(process for process in computing if PurePath(process.name or "").name != MPS_SERVER)
    compute_mode = getattr(nvml, "nvmlDeviceGetComputeMode", None)
    return Gpu(
        index=index,
        uuid=_text(uuid),
        name=_text(_query(nvml.nvmlDeviceGetName, handle) or "unnamed"),
        free_bytes=free,
        total_bytes=total,
        processes=known,
        unseen_bytes=0 if computing or drawing else used,
        driver_version=_text(_query(getattr(nvml, "nvmlSystemGetDriverVersion", None)) or ""),
        compute_capability=".".join(map(str, capability)),
        compute_mode=0 if len(known) < len(computing) else _query(compute_mode, parent) or 0,
    )


def _memory(nvml: Any, handle: Any) -> tuple[int, int, int]:
    """Return free, total and used bytes; the call's second version leaves out what the driver reserves."""
    info = _query(nvml.nvmlDeviceGetMemoryInfo, handle, getattr(nvml, "nvmlMemory_v2", None))
    info = info or _query(nvml.nvmlDeviceGetMemoryInfo, handle)
    return (0, 0, 0) if info is None else (int(info.free), int(info.total), int(info.used))


def _process_name(nvml: Any, pid: int) -> str | None:
    name = _query(nvml.nvmlSystemGetProcessName, pid)
    return textwrap.shorten(_text(name), 60, placeholder="...") if name else None


def _text(value: str | bytes) -> str:
    """Decode text: older versions of NVML's Python bindings return bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _query(call: Callable[..., Any] | None, *arguments: Any) -> Any:
    """Return NVML's answer; None where it fails, or its library is older than its bindings."""
    try:
        return call(*arguments) if call else None
    except Exception:  # its errors have several bases, and undecodable names are UnicodeDecodeError
        return None
