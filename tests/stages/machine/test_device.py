"""GPU manners: which GPU a job takes, whose it leaves alone, and what it says then. No GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.errors import RecipeError
from stages.machine import device as device_room
from stages.machine.device import take_device
from stages.machine.gpu_claims import claim_gpu, launcher, release_gpu
from stages.machine.gpu_taking import GpuTaking
from stages.machine.gpus import Gpu, GpuProcess
from stages.machine.visible_gpus import visible_gpus
from store import LockedError

STRANGER = GpuProcess(999_999_999, "python", 3 * 2**30)
GIB = 2**30
FIRST, SECOND, THIRD = (
    Gpu(index, f"GPU-{letter * 8}-0000", "NVIDIA Test", free_bytes=free * GIB, total_bytes=40 * GIB)
    for index, letter, free in ((0, "a", 30), (1, "b", 39), (2, "c", 20))
)
TORCHRUN = {"LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}


def used(gpu: Gpu, *processes: GpuProcess) -> Gpu:
    return Gpu(gpu.index, gpu.uuid, gpu.name, gpu.free_bytes, gpu.total_bytes, processes or (STRANGER,))


class Job:
    """A job that is to take a GPU: what it did to its environment, and of what it warned."""

    def __init__(self, claims: Path) -> None:
        self.claims, self.environ, self.warnings = claims, dict[str, str](), list[str]()

    def take(self, *gpus: Gpu, name: str = "auto", share: bool = False, **environ: str) -> str | None:
        """The GPU that CUDA_VISIBLE_DEVICES names afterwards."""
        self.environ = dict(environ)
        try:
            GpuTaking(gpus, self.environ, share=share, warn=self.warnings.append, claims=self.claims).take(name)
            return self.environ.get("CUDA_VISIBLE_DEVICES")
        finally:
            for gpu in gpus:
                release_gpu(gpu.uuid, self.claims)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.fixture
def claimed_elsewhere(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Starts a process that claims GPUs and holds them until the test's end; gives its number."""
    script = (
        "import os, sys; from pathlib import Path; from stages.machine.gpu_claims import claim_gpu\n"
        "assert all(claim_gpu(uuid, os.environ, Path(sys.argv[1])) is None for uuid in sys.argv[2:])\n"
        "print(os.getpid(), flush=True); sys.stdin.read()"
    )
    started: list[subprocess.Popen[str]] = []

    def start(*gpus: Gpu, **environ: str) -> int:
        command = [sys.executable, "-c", script, str(tmp_path), *(gpu.uuid for gpu in gpus)]
        here = str(Path(__file__).parents[2])
        process = subprocess.Popen(
            command, stdin=-1, stdout=-1, text=True, env={**os.environ, "PYTHONPATH": here, **environ}
        )
        started.append(process)
        assert process.stdout is not None
        return int(process.stdout.readline())

    yield start
    for process in started:
        process.communicate()


def test_the_gpu_with_the_most_free_memory_is_taken(job: Job) -> None:
    assert job.take(FIRST, SECOND, THIRD) == SECOND.uuid
    assert job.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert job.warnings == []


def test_a_gpu_that_another_process_uses_is_left_alone_however_free_it_is(job: Job) -> None:
    assert job.take(FIRST, used(SECOND), THIRD) == FIRST.uuid


def test_where_every_gpu_is_in_use_the_job_is_refused_in_the_name_of_the_freests_user(job: Job) -> None:
    with pytest.raises(LockedError) as refused:
        job.take(used(FIRST), used(SECOND, GpuProcess(999_999_998), STRANGER))
    assert str(refused.value) == (
        "all 2 GPUs are in use; the freest, GPU 1 (NVIDIA Test) is in use by process 999999998 and 1 more: wait for "
        "it, name another GPU with CUDA_VISIBLE_DEVICES, or share it with --share."
    )
    assert "CUDA_VISIBLE_DEVICES" not in job.environ


def test_sharing_takes_the_freest_gpu_in_use_and_says_with_whom(job: Job) -> None:
    assert job.take(used(FIRST), used(SECOND), share=True) == SECOND.uuid
    assert len(job.warnings) == 1
    assert "GPU 1 (NVIDIA Test) is shared with process 999999999 (python, 3.0 GiB)" in job.warnings[0]


def test_sharing_still_prefers_an_idle_gpu(job: Job) -> None:
    assert job.take(FIRST, used(SECOND), share=True) == FIRST.uuid
    assert job.warnings == []


def test_what_the_person_or_slurm_names_is_taken_and_stays_named(job: Job) -> None:
    assert job.take(used(FIRST), used(SECOND), THIRD, CUDA_VISIBLE_DEVICES="2,1") == "2,1"


@pytest.mark.parametrize("named", ["0", "0,1", "GPU-aaaa", "GPU-aaaaaaaa-0000,GPU-bbbb"])
def test_a_named_gpu_in_use_is_refused_too(job: Job, named: str) -> None:
    with pytest.raises(LockedError, match=r"^GPU 0 \(NVIDIA Test\) is in use by process 999999999 \(python, 3.0 GiB\)"):
        job.take(used(FIRST), SECOND, CUDA_VISIBLE_DEVICES=named)
    assert job.take(used(FIRST), SECOND, share=True, CUDA_VISIBLE_DEVICES=named) == named
    assert len(job.warnings) == 1


@pytest.mark.parametrize("named", ["", "-1", "NoDevFiles", "7", "GPU-zzzz", "MIG-GPU-aaaa/1/0"])
def test_a_name_that_is_no_gpus_here_is_left_to_torch(job: Job, named: str) -> None:
    assert job.take(used(FIRST), used(SECOND), CUDA_VISIBLE_DEVICES=named) == named


def test_a_recipes_number_counts_among_the_visible_gpus(job: Job) -> None:
    assert job.take(used(FIRST), SECOND, name="cuda:1") is None
    with pytest.raises(LockedError, match="GPU 0"):
        job.take(used(FIRST), SECOND, name="cuda:1", CUDA_VISIBLE_DEVICES="1,0")
    assert job.take(used(FIRST), name="cuda:5") is None


def test_numbers_in_cudas_own_order_are_certain_only_where_all_gpus_are_alike() -> None:
    other = Gpu(1, "GPU-dddd", "NVIDIA Other")
    environ = {"CUDA_VISIBLE_DEVICES": "1,0", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    assert visible_gpus([FIRST, SECOND], environ) == [SECOND, FIRST]
    assert visible_gpus([FIRST, other], environ) == [None, None]
    assert visible_gpus([FIRST, other], environ | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == [other, FIRST]


def test_a_part_of_a_divided_gpu_is_taken_and_named_by_its_own_uuid(job: Job) -> None:
    part, other = (Gpu(0, f"MIG-{letter * 8}", "NVIDIA Test MIG 1g.10gb", free_bytes=9 * GIB) for letter in "ef")
    assert job.take(used(part), other) == other.uuid
    with pytest.raises(LockedError, match=r"GPU 0 \(NVIDIA Test MIG 1g.10gb, MIG-eeeeeeee\)"):
        job.take(used(part), other, CUDA_VISIBLE_DEVICES="MIG-eeee")
    assert job.take(used(part), other, CUDA_VISIBLE_DEVICES="MIG-ffffffff") == "MIG-ffffffff"


def test_two_jobs_that_start_at_once_take_different_gpus(
    job: Job, claimed_elsewhere: Callable[..., int], tmp_path: Path
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


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    script = "import os, sys; from pathlib import Path; from stages.machine.gpu_claims import claim_gpu\n"
    script += "print(claim_gpu(sys.argv[2], os.environ, Path(sys.argv[1])))"
    command = [sys.executable, "-c", script, str(tmp_path), FIRST.uuid]
    done = subprocess.run(
        command,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "None"
    assert claim_gpu(FIRST.uuid, {}, tmp_path) is None
    assert claim_gpu(FIRST.uuid, {}, tmp_path) is None  # its own is no obstacle
    release_gpu(FIRST.uuid, tmp_path)


def test_a_claim_that_cannot_be_had_stops_nobody(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert claim_gpu(FIRST.uuid, {}, absent) is None
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    (tmp_path / f"kdpipe-{FIRST.uuid}.lock").symlink_to(elsewhere)
    (tmp_path / f"kdpipe-{SECOND.uuid}.lock").hardlink_to(elsewhere)
    assert claim_gpu(FIRST.uuid, {}, tmp_path) is None
    assert claim_gpu(SECOND.uuid, {}, tmp_path) is None
    release_gpu(SECOND.uuid, tmp_path)
    assert elsewhere.read_text() == "kept"


def test_every_user_of_the_machine_may_lock_a_claims_file(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        claim_gpu(FIRST.uuid, {}, tmp_path)
    finally:
        os.umask(before)
        release_gpu(FIRST.uuid, tmp_path)
    assert (tmp_path / f"kdpipe-{FIRST.uuid}.lock").stat().st_mode & 0o777 == 0o666


def test_processes_of_one_job_take_one_gpu_each_and_share_what_there_is(
    job: Job, claimed_elsewhere: Callable[..., int]
) -> None:
    first_rank, second_rank = TORCHRUN, {**TORCHRUN, "LOCAL_RANK": "1"}
    pid = claimed_elsewhere(SECOND, **first_rank)
    sibling = GpuProcess(999_999_997)  # as in a container: a number that leads to no process
    assert job.take(FIRST, used(SECOND, sibling), **second_rank) == FIRST.uuid
    assert job.take(used(SECOND, sibling), **second_rank) == SECOND.uuid
    assert job.take(used(SECOND, sibling), CUDA_VISIBLE_DEVICES="1", **second_rank) == "1"
    assert job.warnings == []
    with pytest.raises(LockedError, match=f"process {pid} on"):
        job.take(SECOND, **{**second_rank, "MASTER_PORT": "29500"})


def test_ranks_begin_with_different_gpus_even_without_claims(tmp_path: Path) -> None:
    job = Job(tmp_path / "absent")
    taken = [job.take(FIRST, SECOND, THIRD, **{**TORCHRUN, "LOCAL_RANK": str(rank)}) for rank in range(3)]
    assert taken == [SECOND.uuid, FIRST.uuid, THIRD.uuid]
    assert job.take(FIRST, SECOND, THIRD, **{**TORCHRUN, "LOCAL_RANK": "4"}, CUDA_VISIBLE_DEVICES="0,1,2") == "0,1,2"


def test_ranks_count_through_the_visible_gpus(job: Job) -> None:
    with pytest.raises(LockedError, match="GPU 1"):
        job.take(FIRST, used(SECOND), CUDA_VISIBLE_DEVICES="0,1", **{**TORCHRUN, "LOCAL_RANK": "3"})


def test_processes_belong_together_by_their_launcher() -> None:
    assert launcher({}) is None
    assert launcher({"SLURM_JOB_ID": "7", "SLURM_LOCALID": "0"}) is None  # a batch script's variables are no srun's
    assert launcher(TORCHRUN) == launcher({**TORCHRUN, "LOCAL_RANK": "3"}) != launcher({**TORCHRUN, "MASTER_PORT": "1"})
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert launcher(step) != launcher({**step, "SLURM_STEP_ID": "1"})


class FakeCuda:
    """Stands for a torch that sees `count` GPUs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, claims: Path, count: int, *gpus: Gpu) -> None:
        self.claims = claims
        self.fractions: list[tuple[float, str]] = []
        self.current: list[str] = []
        self.warnings: list[str] = []
        cuda = device_room.torch.cuda
        self.taken: dict[str, torch.device] = {}
        monkeypatch.setattr(device_room, "_taken", self.taken)
        monkeypatch.setattr(cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(cuda, "device_count", lambda: count)
        monkeypatch.setattr(cuda, "is_initialized", lambda: False)
        monkeypatch.setattr(cuda, "set_device", lambda device: self.current.append(str(device)))
        monkeypatch.setattr(
            cuda, "set_per_process_memory_fraction", lambda share, device: self.fractions.append((share, str(device)))
        )
        monkeypatch.setattr(device_room.torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(device_room, "list_gpus", lambda: gpus or None)
        for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "SLURM_LOCALID"):
            monkeypatch.setenv(name, "")  # noted down as absent or not, and put back in the end
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

    def take(self, name: str, **options: Any) -> str:
        """The device that a new process would take."""
        self.taken.clear()
        return str(take_device(name, warn=self.warnings.append, claims=self.claims, **options))


def test_a_machine_without_gpus_computes_on_its_cpu_in_silence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = FakeCuda(monkeypatch, tmp_path, 0)
    assert cuda.take("auto", memory_fraction=0.5) == "cpu"
    assert cuda.warnings == cuda.fractions == []
    with pytest.raises(RecipeError, match="the recipe's device is 'cuda', and torch sees 0 GPUs"):
        cuda.take("cuda")


def test_the_cpu_is_had_without_asking_for_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = FakeCuda(monkeypatch, tmp_path, 2, used(FIRST))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert cuda.take("cpu") == "cpu"
    assert cuda.warnings == []
    with pytest.raises(LockedError):
        cuda.take("auto")


def test_without_nvml_torchs_own_order_holds_and_a_warning_says_what_cannot_be_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cuda = FakeCuda(monkeypatch, tmp_path, 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert cuda.take("auto") == cuda.take("cuda") == "cuda:1"
    assert cuda.current == ["cuda:1", "cuda:1"]
    assert all("NVML does not answer" in warning for warning in cuda.warnings)
    assert len(cuda.warnings) == 2


def test_the_memory_fraction_is_of_the_gpu_that_was_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = FakeCuda(monkeypatch, tmp_path, 2, FIRST, SECOND)
    assert cuda.take("cuda:1", memory_fraction=0.5) == "cuda:1"
    assert cuda.fractions == [(0.5, "cuda:1")]
    assert cuda.take("cuda:0") == "cuda:0"
    assert len(cuda.fractions) == 1
    assert cuda.warnings == []
    release_gpu(FIRST.uuid, tmp_path)
    release_gpu(SECOND.uuid, tmp_path)


def test_a_process_takes_its_device_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = FakeCuda(monkeypatch, tmp_path, 2, FIRST, used(SECOND))
    assert cuda.take("auto") == "cuda:0"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == FIRST.uuid
    monkeypatch.setattr(device_room, "list_gpus", lambda: (used(FIRST), used(SECOND)))  # now it is itself a user
    assert str(take_device("auto", warn=cuda.warnings.append, claims=tmp_path)) == "cuda:0"
    release_gpu(FIRST.uuid, tmp_path)


def test_gpus_that_torch_cannot_use_are_said_to_be_there_and_let_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, claimed_elsewhere: Callable[..., int]
) -> None:
    cuda = FakeCuda(monkeypatch, tmp_path, 0, FIRST)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert cuda.take("auto") == "cpu"
    assert cuda.warnings == []  # none is visible
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert cuda.take("auto") == "cpu"
    assert "torch can use none of 1 GPUs" in cuda.warnings[0]
    assert claimed_elsewhere(FIRST)  # whom a claim would have refused
