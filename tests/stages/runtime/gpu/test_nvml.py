"""Tests of listing GPUs and their users with a fake NVML."""
# ruff: noqa: N802, N815  the names are NVML's

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import psutil
import pytest

from kdpipe.stages.runtime.gpu.nvml import EXCLUSIVE, PROHIBITED, Gpu, GpuProcess, list_gpus
from kdpipe.stages.runtime.gpu.users import gpu_user, is_foreign

GIB = 2**30


class FakeProcess:
    """A psutil.Process in a made-up tree: pid -> (status, parent)."""

    tree: ClassVar[dict[int, tuple[str, int]]] = {}

    def __init__(self, pid: int) -> None:
        if pid not in self.tree:
            raise psutil.NoSuchProcess(pid)
        self.pid = pid

    def status(self) -> str:
        return self.tree[self.pid][0]

    def parents(self) -> list[SimpleNamespace]:
        ancestors, pid = [], self.pid
        while pid in self.tree:
            pid = self.tree[pid][1]
            ancestors.append(SimpleNamespace(pid=pid))
        return ancestors


def test_processes_of_the_same_job_are_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    own, parent, worker, sibling, zombie = os.getpid(), 3_000_001, 3_000_002, 3_000_003, 3_000_004
    tree = {own: parent, parent: 1, worker: own, sibling: parent, zombie: 1}
    statuses = {pid: (psutil.STATUS_RUNNING, above) for pid, above in tree.items()}
    monkeypatch.setattr(FakeProcess, "tree", statuses | {zombie: (psutil.STATUS_ZOMBIE, 1)})
    monkeypatch.setattr(psutil, "Process", FakeProcess)
    assert not any(is_foreign(pid, False) for pid in (own, parent, worker, zombie))
    assert is_foreign(sibling, False)  # a shell started it too
    assert not is_foreign(sibling, True)  # torchrun started it too
    assert is_foreign(999_999_999, True)


def test_memory_without_known_process_counts_as_in_use() -> None:
    hidden = Gpu(0, "GPU-a", "NVIDIA Test", unseen_bytes=5 * GIB)
    assert gpu_user(hidden, False) == "a process that is not visible from here (5.0 GiB of its memory are in use)"
    assert gpu_user(Gpu(0, "GPU-a", "NVIDIA Test", unseen_bytes=600 * 2**20), False) is None
    own = Gpu(0, "GPU-a", "NVIDIA Test", processes=(GpuProcess(os.getpid()),))
    assert gpu_user(own, False) is None


def refuse(*arguments: Any) -> Any:
    raise FakeNvml.NVMLError("not supported")


class FakeNvml:
    """Fake NVML bindings: a handle is a dictionary of facts; an absent fact raises NVMLError."""

    class NVMLError(Exception):
        pass

    nvmlMemory_v2 = 2

    def __init__(self, *handles: dict[str, Any], names: dict[int, Any] | None = None) -> None:
        self.handles, self.names, self.num_shutdowns = handles, names or {}, 0

    def nvmlInit(self) -> None:
        pass

    def nvmlShutdown(self) -> None:
        self.num_shutdowns += 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.handles)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return self.handles[index] or refuse()

    def nvmlDeviceGetMigMode(self, handle: dict[str, Any]) -> list[int]:
        return [1, 1] if "parts" in handle else refuse()

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: dict[str, Any]) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: dict[str, Any], place: int) -> dict[str, Any]:
        return handle["parts"][place] if place < len(handle["parts"]) else refuse()

    def nvmlDeviceGetUUID(self, handle: dict[str, Any]) -> Any:
        return handle.get("uuid") or refuse()

    def nvmlDeviceGetName(self, handle: dict[str, Any]) -> Any:
        return handle.get("name") or refuse()

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any], version: int | None = None) -> Any:
        free, total, used = handle.get("memory" if version else "memory_with_reserved") or refuse()
        return SimpleNamespace(free=free, total=total, used=used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: dict[str, Any]) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in handle.get("computing") or ()]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: dict[str, Any]) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in handle.get("drawing") or ()]

    def nvmlDeviceGetComputeMode(self, handle: dict[str, Any]) -> int:
        return handle.get("mode") or refuse()

    def nvmlSystemGetProcessName(self, pid: int) -> Any:
        return self.names.get(pid) or refuse()


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeNvml]:
    def install(*handles: dict[str, Any], **settings: Any) -> FakeNvml:
        fake = FakeNvml(*handles, **settings)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return install


def test_gpu_is_read_from_nvml(nvml: Callable[..., FakeNvml]) -> None:
    fake = nvml(
        {
            "uuid": "GPU-a",
            "name": "NVIDIA A",
            "memory": (30 * GIB, 40 * GIB, 10 * GIB),
            "computing": [(11, 4 * GIB), (12, 1 * GIB)],
            "drawing": [(12, 1 * GIB), (13, 2 * GIB)],
        },
        names={11: "/usr/bin/python3", 12: "x" * 90},
    )
    (gpu,) = list_gpus() or ()
    assert (gpu.index, gpu.uuid, gpu.name) == (0, "GPU-a", "NVIDIA A")
    assert (gpu.free_bytes, gpu.total_bytes, gpu.unseen_bytes) == (30 * GIB, 40 * GIB, 0)
    assert str(gpu.processes[0]) == "process 11 (/usr/bin/python3, 4.0 GiB)"
    assert len(str(gpu.processes[1].name)) <= 60
    assert fake.num_shutdowns == 1


def test_bytes_and_missing_answers_of_nvml_are_read(nvml: Callable[..., FakeNvml]) -> None:
    nvml(
        {},
        {"uuid": b"GPU-b", "name": b"NVIDIA B", "memory_with_reserved": (1, 3, 2), "computing": [(11, None)]},
        {"uuid": "GPU-c", "name": "NVIDIA C"},
        {"uuid": "GPU-d", "memory": (1, 3, 2)},
    )
    second, third, fourth = list_gpus() or ()
    assert (second.index, second.uuid, second.name, second.total_bytes) == (1, "GPU-b", "NVIDIA B", 3)
    assert second.processes == (GpuProcess(11),)
    assert second.unseen_bytes == 0
    assert str(second.processes[0]) == "process 11"
    assert (third.index, third.free_bytes, third.processes) == (2, 0, ())
    assert fourth.unseen_bytes == 2


def test_mps_server_is_not_a_user(nvml: Callable[..., FakeNvml]) -> None:
    handle = {"uuid": "GPU-a", "memory": (0, 2 * GIB, 2 * GIB), "computing": [(11, 2 * GIB)], "mode": EXCLUSIVE}
    nvml(handle, names={11: "/usr/bin/nvidia-cuda-mps-server"})
    (gpu,) = list_gpus() or ()
    assert gpu_user(gpu, False) is None
    assert gpu.compute_mode == 0  # its clients share the GPU


def test_compute_mode_is_read(nvml: Callable[..., FakeNvml]) -> None:
    nvml({"uuid": "GPU-a", "mode": PROHIBITED}, {"uuid": "GPU-b"}, {"uuid": "GPU-c", "mode": EXCLUSIVE})
    assert [gpu.compute_mode for gpu in list_gpus() or ()] == [PROHIBITED, 0, EXCLUSIVE]


def test_divided_gpu_is_listed_by_its_instances(nvml: Callable[..., FakeNvml]) -> None:
    nvml({"uuid": "GPU-a", "parts": [{"uuid": "MIG-a"}, {"uuid": "MIG-b"}]}, {"uuid": "GPU-b", "name": "NVIDIA B"})
    assert [(gpu.index, gpu.uuid) for gpu in list_gpus() or ()] == [(0, "MIG-a"), (0, "MIG-b"), (1, "GPU-b")]


def test_no_gpus_are_listed_without_nvml(monkeypatch: pytest.MonkeyPatch, nvml: Callable[..., FakeNvml]) -> None:
    fake = nvml({"uuid": "GPU-a"})
    monkeypatch.setattr(fake, "nvmlInit", refuse, raising=False)
    assert list_gpus() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert list_gpus() is None
