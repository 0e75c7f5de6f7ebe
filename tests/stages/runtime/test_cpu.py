"""Tests of the number of cores of a process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kdpipe.stages.runtime.cpu import available_cores, num_cores, omp_num_threads

Machine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Make a fake machine.

    Its affinity masks are `cores` and, for the launcher, `launcher_cores`; `groups` is /proc/self/cgroup, `files` are
    below /sys/fs/cgroup.
    """

    def make(cores: int = 64, launcher_cores: int = 64, groups: str = "", files: dict[str, str] | None = None) -> Path:
        masks = {0: set(range(cores)), os.getppid(): set(range(launcher_cores))}
        monkeypatch.setattr(os, "sched_getaffinity", masks.__getitem__)
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
        for name, text in (files or {}).items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def test_without_quotas_the_affinity_mask_decides(machine: Machine) -> None:
    assert available_cores({}, machine(cores=6)) == 6


def test_without_proc_the_affinity_mask_decides(tmp_path: Path) -> None:
    assert available_cores({}, tmp_path) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("200000 100000\n", 2), ("150000 100000", 2), ("50000 100000", 1), ("6400000 50000", 64), ("max 100000", 64)],
)
def test_quota_bounds_the_cores(machine: Machine, quota: str, cores: int) -> None:
    assert available_cores({}, machine(groups="0::/\n", files={"cpu.max": quota})) == cores


def test_smallest_quota_of_all_ancestors_counts(machine: Machine) -> None:
    files = {
        "cpu.max": "max 100000",
        "slurm/cpu.max": "1600000 100000",
        "slurm/job_7/cpu.max": "300000 100000",
        "slurm/job_7/step_0/cpu.max": "max 100000",
        "slurm/job_8/cpu.max": "100000 100000",
    }
    assert available_cores({}, machine(groups="0::/slurm/job_7/step_0\n", files=files)) == 3


def test_cgroup_path_from_outside_means_the_containers(machine: Machine) -> None:
    assert available_cores({}, machine(groups="0::/../docker/abc\n", files={"cpu.max": "400000 100000"})) == 4


@pytest.mark.parametrize("odd", ["", "max", "x y", "0 0", "100000 0", "-1 100000", "1 2 3", "\x00\xff"])
def test_malformed_quota_files_are_ignored(machine: Machine, odd: str) -> None:
    groups = f"nonsense\n:\n4:cpu\n0::/a\n{odd}\n"
    files = {"cpu.max": odd, "a/cpu.max": odd}
    assert available_cores({}, machine(groups=groups, files=files)) == 64


@pytest.mark.parametrize(("own", "launchers", "cores"), [(64, 64, 16), (16, 64, 16), (4, 64, 4), (8, 8, 2), (2, 2, 1)])
def test_torchrun_processes_share_its_cores(machine: Machine, own: int, launchers: int, cores: int) -> None:
    root = machine(cores=own, launcher_cores=launchers)
    assert available_cores({"LOCAL_WORLD_SIZE": "4"}, root) == cores
    assert available_cores({"LOCAL_WORLD_SIZE": "1"}, root) == available_cores({"LOCAL_WORLD_SIZE": "?"}, root) == own


def test_torchrun_processes_share_a_quota(machine: Machine) -> None:
    root = machine(groups="0::/\n", files={"cpu.max": "800000 100000"})
    assert available_cores({"LOCAL_WORLD_SIZE": "4"}, root) == 2


def test_srun_task_keeps_to_its_share(machine: Machine) -> None:
    root = machine(cores=32)
    assert available_cores({"SLURM_STEP_NUM_TASKS": "4", "SLURM_CPUS_PER_TASK": "8"}, root) == 8
    assert available_cores({"SLURM_STEP_NUM_TASKS": "4"}, root) == 32
    assert available_cores({"SLURM_CPUS_PER_TASK": "8"}, root) == 32  # a batch script's: its mask says what it has


@pytest.mark.parametrize(
    ("environ", "threads"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({"OMP_NUM_THREADS": "many"}, None),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, None),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "none"}, 2),
    ],
)
def test_omp_num_threads_counts_unless_it_is_torchruns(environ: dict[str, str], threads: int | None) -> None:
    assert omp_num_threads(environ) == threads


def test_this_process_has_at_least_one_core() -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
