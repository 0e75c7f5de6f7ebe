"""Tests of GPU selection on fake GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.paths import ROOT

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.runtime.gpu import device as device_module
from kdpipe.stages.runtime.gpu import users
from kdpipe.stages.runtime.gpu.device import GpuSelector, select_device, torch_device
from kdpipe.stages.runtime.gpu.nvml import EXCLUSIVE, PROHIBITED, Gpu, GpuProcess
from kdpipe.stages.runtime.gpu.users import _claims, claim_gpu, is_launched, release_gpu
from kdpipe.store import LockedError

FOREIGN = GpuProcess(999_999_999, "python", 3 * 2**30)
GIB = 2**30
FIRST, SECOND, THIRD = (
    Gpu(index, f"GPU-{letter * 8}-0000", "NVIDIA Test", free_bytes=free * GIB, total_bytes=40 * GIB)
    for index, letter, free in ((0, "a", 30), (1, "b", 39), (2, "c", 20))
)
TORCHRUN = {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}


def used(gpu: Gpu, *processes: GpuProcess) -> Gpu:
    return Gpu(gpu.index, gpu.uuid, gpu.name, gpu.free_bytes, gpu.total_bytes, processes or (FOREIGN,))


class TrainJob:
    """A job that selects a GPU, with its environment and warnings."""

    def __init__(self, claims: Path) -> None:
        self.claims, self.environ, self.warnings = claims, dict[str, str](), list[str]()

    def take(self, *gpus: Gpu, name: str = "auto", share: bool = False, **environ: str) -> str | None:
        """Return CUDA_VISIBLE_DEVICES after the selection."""
        self.environ = dict(environ)
        try:
            selector = GpuSelector(gpus, self.environ, share=share, warn=self.warnings.append, claims=self.claims)
            if not selector.select(name):
                selector.reserve(name, "not reported")
            return self.environ.get("CUDA_VISIBLE_DEVICES")
        finally:
            for gpu in gpus:
                release_gpu(gpu.uuid, self.claims)


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    return TrainJob(tmp_path)


@pytest.fixture
def claimed_elsewhere(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Start a process that claims GPUs until the test's end; returns its pid."""
    script = (
        "import os, sys; from pathlib import Path; from kdpipe.stages.runtime.gpu.users import claim_gpu\n"
        "assert all(claim_gpu(uuid, Path(sys.argv[1])) is None for uuid in sys.argv[2:])\n"
        "print(os.getpid(), flush=True); sys.stdin.read()"
    )
    started: list[subprocess.Popen[str]] = []

    def start(*gpus: Gpu, **environ: str) -> int:
        command = [sys.executable, "-c", script, str(tmp_path), *(gpu.uuid for gpu in gpus)]
        here = str(ROOT)
        process = subprocess.Popen(
            command, stdin=-1, stdout=-1, text=True, env={**os.environ, "PYTHONPATH": here, **environ}
        )
        started.append(process)
        assert process.stdout is not None
        return int(process.stdout.readline())

    yield start
    for process in started:
        process.communicate()


def test_gpu_with_most_free_memory_is_selected(job: TrainJob) -> None:
    assert job.take(FIRST, SECOND, THIRD) == SECOND.uuid
    assert job.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert job.warnings == []


def test_gpu_in_use_is_not_selected(job: TrainJob) -> None:
    assert job.take(FIRST, used(SECOND), THIRD) == FIRST.uuid


def test_all_gpus_in_use_is_an_error_naming_the_user(job: TrainJob) -> None:
    with pytest.raises(LockedError) as refused:
        job.take(used(FIRST), used(SECOND, GpuProcess(999_999_998), FOREIGN))
    assert str(refused.value) == (
        "all 2 GPUs are in use; the freest, GPU 1 (NVIDIA Test) is in use by process 999999998 and 1 more: wait for "
        "it, name another GPU with CUDA_VISIBLE_DEVICES, or share it with --share."
    )
    assert "CUDA_VISIBLE_DEVICES" not in job.environ


def test_sharing_selects_freest_gpu_in_use_and_warns(job: TrainJob) -> None:
    assert job.take(used(FIRST), used(SECOND), share=True) == SECOND.uuid
    assert len(job.warnings) == 1
    assert "GPU 1 (NVIDIA Test) is shared with process 999999999 (python, 3.0 GiB)" in job.warnings[0]


def test_sharing_prefers_an_idle_gpu(job: TrainJob) -> None:
    assert job.take(FIRST, used(SECOND), share=True) == FIRST.uuid
    assert job.warnings == []


def test_visible_devices_of_user_or_slurm_are_kept(job: TrainJob) -> None:
    assert job.take(used(FIRST), used(SECOND), THIRD, CUDA_VISIBLE_DEVICES="2,1") == "2,1"


@pytest.mark.parametrize("named", ["0", "0,1", "GPU-aaaa", "GPU-aaaaaaaa-0000,GPU-bbbb"])
def test_named_gpu_in_use_is_an_error(job: TrainJob, named: str) -> None:
    with pytest.raises(LockedError, match=r"^GPU 0 \(NVIDIA Test\) is in use by process 999999999 \(python, 3.0 GiB\)"):
        job.take(used(FIRST), SECOND, CUDA_VISIBLE_DEVICES=named)
    assert job.take(used(FIRST), SECOND, share=True, CUDA_VISIBLE_DEVICES=named) == named
    assert len(job.warnings) == 1


@pytest.mark.parametrize("named", ["", "-1", "NoDevFiles", "7", "GPU-zzzz", "MIG-GPU-aaaa/1/0"])
def test_unknown_visible_devices_are_left_to_torch(job: TrainJob, named: str) -> None:
    assert job.take(used(FIRST), used(SECOND), CUDA_VISIBLE_DEVICES=named) == named


def test_device_number_counts_among_visible_gpus(job: TrainJob) -> None:
    assert job.take(used(FIRST), SECOND, name="cuda:1") is None
    with pytest.raises(LockedError, match="GPU 0"):
        job.take(used(FIRST), SECOND, name="cuda:1", CUDA_VISIBLE_DEVICES="1,0")
    assert job.take(used(FIRST), name="cuda:5") is None


def test_prohibited_gpu_is_not_selected(job: TrainJob) -> None:
    closed = replace(SECOND, compute_mode=PROHIBITED)
    assert job.take(FIRST, closed, THIRD) == FIRST.uuid
    for environ in ({}, {"CUDA_VISIBLE_DEVICES": "1"}):
        with pytest.raises(RecipeError, match=r"GPU 1 \(NVIDIA Test\) .*closed to computing"):
            job.take(closed, share=True, **environ)


def test_exclusive_gpu_in_use_cannot_be_shared(job: TrainJob) -> None:
    exclusive = replace(used(SECOND), compute_mode=EXCLUSIVE)
    with pytest.raises(LockedError, match="GPU 1 .*, which lets in one process at a time, is in use by process 999"):
        job.take(exclusive, share=True)
    assert job.take(replace(SECOND, compute_mode=EXCLUSIVE)) == SECOND.uuid


def test_mig_instance_is_selected_by_its_uuid(job: TrainJob) -> None:
    part, other = (Gpu(0, f"MIG-{letter * 8}", "NVIDIA Test MIG 1g.10gb", free_bytes=9 * GIB) for letter in "ef")
    assert job.take(used(part), other) == other.uuid
    with pytest.raises(LockedError, match=r"GPU 0 \(NVIDIA Test MIG 1g.10gb, MIG-eeeeeeee\)"):
        job.take(used(part), other, CUDA_VISIBLE_DEVICES="MIG-eeee")
    assert job.take(used(part), other, CUDA_VISIBLE_DEVICES="MIG-ffffffff") == "MIG-ffffffff"


def test_jobs_starting_at_once_select_different_gpus(
    job: TrainJob, claimed_elsewhere: Callable[..., int], tmp_path: Path
) -> None:
    pid = claimed_elsewhere(SECOND)
    assert job.take(FIRST, SECOND) == FIRST.uuid
    with pytest.raises(
        LockedError, match=rf"^GPU 1 \(NVIDIA Test\) is in use by process {pid} on \S+, for \d+ s: wait"
    ):
        job.take(SECOND)
    assert job.take(SECOND, share=True) == SECOND.uuid
    assert len(job.warnings) == 1
    assert [path.name for path in tmp_path.iterdir() if SECOND.uuid in path.name] == [f"kdpipe-{SECOND.uuid}.lock"]


def test_gpu_of_the_process_that_started_this_one_is_used(
    job: TrainJob, claimed_elsewhere: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = claimed_elsewhere(SECOND)
    monkeypatch.setattr(users, "_lineage", lambda pid: [pid, notebook])
    assert job.take(FIRST, SECOND) == FIRST.uuid
    assert job.take(SECOND) == SECOND.uuid
    assert job.take(SECOND, name="cuda:0") is None
    assert job.warnings == []


def test_claim_ends_with_its_process(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from kdpipe.stages.runtime.gpu.users import claim_gpu\n"
    script += "print(claim_gpu(sys.argv[2], Path(sys.argv[1])))"
    command = [sys.executable, "-c", script, str(tmp_path), FIRST.uuid]
    done = subprocess.run(
        command,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "None"
    assert claim_gpu(FIRST.uuid, tmp_path) is None
    assert claim_gpu(FIRST.uuid, tmp_path) is None  # a second claim of the same process
    release_gpu(FIRST.uuid, tmp_path)


def test_unavailable_claim_is_no_error(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert claim_gpu(FIRST.uuid, absent) is None
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    (tmp_path / f"kdpipe-{FIRST.uuid}.lock").symlink_to(elsewhere)
    (tmp_path / f"kdpipe-{SECOND.uuid}.lock").hardlink_to(elsewhere)
    assert claim_gpu(FIRST.uuid, tmp_path) is None
    assert claim_gpu(SECOND.uuid, tmp_path) is None
    release_gpu(SECOND.uuid, tmp_path)
    assert elsewhere.read_text() == "kept"


def test_claim_file_is_writable_by_all_users(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        claim_gpu(FIRST.uuid, tmp_path)
    finally:
        os.umask(before)
        release_gpu(FIRST.uuid, tmp_path)
    assert (tmp_path / f"kdpipe-{FIRST.uuid}.lock").stat().st_mode & 0o777 == 0o666


def test_processes_of_one_job_spread_over_gpus(job: TrainJob, claimed_elsewhere: Callable[..., int]) -> None:
    first_rank, second_rank = TORCHRUN, {**TORCHRUN, "LOCAL_RANK": "1"}
    pid = claimed_elsewhere(SECOND, **first_rank)
    sibling = GpuProcess(999_999_997)  # as in a container: a number that leads to no process
    assert job.take(FIRST, used(SECOND, sibling), **second_rank) == FIRST.uuid
    for named in ({}, {"CUDA_VISIBLE_DEVICES": "1"}):  # more processes than GPUs
        environ = second_rank | named
        with pytest.raises(RecipeError, match="none left for process 1 of this machine: start one process for each"):
            job.take(used(SECOND, sibling), **environ)
        expected = named.get("CUDA_VISIBLE_DEVICES", SECOND.uuid)
        assert job.take(used(SECOND, sibling), share=True, **environ) == expected
        assert job.take(used(SECOND, sibling), KDPIPE_DIST_BACKEND="gloo", **environ) == expected
    assert job.take(used(SECOND, sibling), name="cuda:0", **second_rank) is None  # as the recipe names it
    assert job.warnings == []
    with pytest.raises(LockedError, match=f"process {pid} on"):
        job.take(SECOND)


def test_ranks_select_different_gpus_without_claims(tmp_path: Path) -> None:
    job = TrainJob(tmp_path / "absent")
    taken = [job.take(FIRST, SECOND, THIRD, **{**TORCHRUN, "LOCAL_RANK": str(rank)}) for rank in range(3)]
    assert taken == [SECOND.uuid, FIRST.uuid, THIRD.uuid]
    assert job.take(FIRST, SECOND, THIRD, **{**TORCHRUN, "LOCAL_RANK": "4"}, CUDA_VISIBLE_DEVICES="0,1,2") == "0,1,2"


def test_ranks_cycle_through_visible_gpus(job: TrainJob) -> None:
    with pytest.raises(LockedError, match="GPU 1"):
        job.take(FIRST, used(SECOND), CUDA_VISIBLE_DEVICES="0,1", **{**TORCHRUN, "LOCAL_RANK": "3"})


def test_torchrun_and_srun_launch_processes() -> None:
    assert not is_launched({"SLURM_JOB_ID": "7", "SLURM_LOCALID": "0"})  # a batch script's variables are no srun's
    assert is_launched(TORCHRUN)
    assert is_launched({"SLURM_STEP_NUM_TASKS": "2"})


class FakeCuda:
    """A fake torch that sees `count` GPUs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, claims: Path, count: int, *gpus: Gpu) -> None:
        self.claims = claims
        self.fractions: list[tuple[float, str]] = []
        self.current: list[str] = []
        self.warnings: list[str] = []
        cuda = device_module.torch.cuda
        self.taken: dict[str, torch.device] = {}
        monkeypatch.setattr(device_module, "_selected", self.taken)
        monkeypatch.setattr(cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(cuda, "device_count", lambda: count)
        monkeypatch.setattr(cuda, "is_initialized", lambda: False)
        self.uuid = gpus[0].uuid if gpus else ""  # of the GPU that torch uses
        monkeypatch.setattr(
            cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=self.uuid.removeprefix("GPU-"))
        )
        monkeypatch.setattr(cuda, "set_device", lambda device: self.current.append(str(device)))
        monkeypatch.setattr(
            cuda, "set_per_process_memory_fraction", lambda share, device: self.fractions.append((share, str(device)))
        )
        monkeypatch.setattr(device_module.torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(device_module, "list_gpus", lambda: gpus or None)
        for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "SLURM_LOCALID"):
            monkeypatch.setenv(name, "")  # restored at the end
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

    def take(self, name: str, **options: Any) -> str:
        """Return the device that a new process would select."""
        self.taken.clear()
        return str(select_device(name, warn=self.warnings.append, claims=self.claims, **options))


def test_machine_without_gpus_uses_cpu_without_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = FakeCuda(monkeypatch, tmp_path, 0)
    assert cuda.take("auto", memory_fraction=0.5) == "cpu"
    assert cuda.warnings == cuda.fractions == []
    with pytest.raises(RecipeError, match="device is 'cuda', and torch sees 0 GPUs"):
        cuda.take("cuda")


def test_gpu_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeCuda(monkeypatch, tmp_path, 2)
    monkeypatch.setattr(device_module.torch.cuda, "current_device", lambda: 1)
    given = ("cuda", torch.device("cuda"), "cuda:0", torch.device("cpu"))  # Accelerate's device has no number
    assert [str(torch_device(one)) for one in given] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    with pytest.raises(RecipeError, match="device is 'cuda:2', and torch sees 2 GPUs"):
        torch_device(torch.device("cuda:2"))


def test_cpu_is_selected_without_querying_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = FakeCuda(monkeypatch, tmp_path, 2, used(FIRST))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert cuda.take("cpu") == "cpu"
    assert cuda.warnings == []
    with pytest.raises(LockedError):
        cuda.take("auto")


def test_without_nvml_torchs_order_is_used_with_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = FakeCuda(monkeypatch, tmp_path, 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert cuda.take("auto") == cuda.take("cuda") == "cuda:1"
    assert cuda.current == ["cuda:1", "cuda:1"]
    assert all("NVML, the driver's library, is not available" in warning for warning in cuda.warnings)
    assert len(cuda.warnings) == 2


def test_memory_fraction_applies_to_the_selected_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = FakeCuda(monkeypatch, tmp_path, 2, FIRST, SECOND)
    cuda.uuid = SECOND.uuid
    assert cuda.take("cuda:1", memory_fraction=0.5) == "cuda:1"
    cuda.uuid = FIRST.uuid
    assert cuda.fractions == [(0.5, "cuda:1")]
    assert cuda.take("cuda:0") == "cuda:0"
    assert len(cuda.fractions) == 1
    assert cuda.warnings == []
    release_gpu(FIRST.uuid, tmp_path)
    release_gpu(SECOND.uuid, tmp_path)


def test_device_is_selected_once_per_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = FakeCuda(monkeypatch, tmp_path, 2, FIRST, used(SECOND))
    assert cuda.take("auto") == "cuda:0"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == FIRST.uuid
    monkeypatch.setattr(device_module, "list_gpus", lambda: (used(FIRST), used(SECOND)))  # now this process uses it
    assert str(select_device("auto", warn=cuda.warnings.append, claims=tmp_path)) == "cuda:0"
    release_gpu(FIRST.uuid, tmp_path)


def test_gpus_unusable_by_torch_are_released_with_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, claimed_elsewhere: Callable[..., int]
) -> None:
    cuda = FakeCuda(monkeypatch, tmp_path, 0, FIRST)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert cuda.take("auto") == "cpu"
    assert cuda.warnings == []  # none is visible
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert cuda.take("auto") == "cpu"
    assert "torch can use none of 1 GPUs" in cuda.warnings[0]
    assert claimed_elsewhere(FIRST)  # a remaining claim would refuse it


def test_renumbered_gpu_is_found_by_its_uuid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A batch system shows CUDA one GPU, as number 0; NVML lists all, or that one as number 2."""
    for listed in ((FIRST, used(THIRD)), (used(THIRD),)):
        cuda = FakeCuda(monkeypatch, tmp_path, 1, *listed)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        cuda.uuid = THIRD.uuid
        with pytest.raises(LockedError, match="GPU 2"):
            cuda.take("auto")
    cuda = FakeCuda(monkeypatch, tmp_path, 1, used(FIRST), THIRD)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    cuda.uuid = THIRD.uuid
    assert cuda.take("auto") == "cuda:0"
    assert cuda.warnings == []
    assert set(_claims) == {tmp_path / f"kdpipe-{THIRD.uuid}.lock"}
    release_gpu(THIRD.uuid, tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    cuda.uuid = "GPU-unknown"
    cuda.take("auto")
    assert "NVML does not list the GPU that torch uses" in cuda.warnings[0]


def test_cpu_build_of_torch_names_what_it_leaves_unused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = FakeCuda(monkeypatch, tmp_path, 0, FIRST)
    monkeypatch.setattr(device_module.torch.backends.cuda, "is_built", lambda: False)
    assert cuda.take("auto") == cuda.take("cpu") == "cpu"
    (warning,) = cuda.warnings
    assert warning.startswith("running on the CPU, and not on GPU 0 (NVIDIA Test): torch ")
    assert "is built for CPUs only: install a build for CUDA" in warning
    with pytest.raises(RecipeError, match="device is 'cuda', and torch .* is built for CPUs only"):
        cuda.take("cuda")
