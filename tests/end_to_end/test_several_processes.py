"""Two processes train the same student as one: same batches, weights equal up to rounding, one writer.

The students have batch norm, a relational loss, and a hint with an adapter on hard samples only, of which one process
may have more than the other.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.device import DEVICE
from support.kdpipe_process import kdpipe, kdpipe_here, signal_when, start
from support.two_processes import free_port
from support.warm_process import WarmProcess

from kdpipe.stages.models.safetensors_io import load_tensors

RECIPE = """
# Command: kdpipe train-student several.toml. Hardware: any. Time: seconds. Expect: an alone and a distilled student.
name = "several"
device = "DEVICE"
num_threads = 1
data = { name = "digits", num_train = 200 }
views = { num_views = 2, operations = [{ name = "RandomCrop", padding = 1 }] }
cache = { batch_size = 64 }

[teacher]
export = false
model = { name = "cnn", args = { width = 8 } }
train = { epochs = 2, batch_size = 32, checkpoint_every_s = 0, precision = "float32" }

[student]
export = false
model = { name = "cnn", args = { width = 4 } }
train = { epochs = 2, batch_size = 32, lr = 0.02, checkpoint_every_s = 0, precision = "float32" }
seeds = [0]

[[distill]]
loss = "kd"

[[distill]]
loss = "rkd"
layers = [["stage2", "stage2"]]
weight = 0.1
samples = { filter = "correct" }

[[distill]]
loss = "hint"
layers = [["stage2", "stage2"]]
weight = 0.5
samples = { filter = "hard", fraction = 0.1, weighting = "entropy" }
""".replace("DEVICE", str(DEVICE))

KINDS = ("alone", "distilled")


def start_two(*arguments: str | Path) -> list[WarmProcess]:
    """Start two processes as torchrun does; they share a GPU, which NCCL refuses."""
    of_both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "KDPIPE_DIST_BACKEND": "gloo"}
    return [start(*arguments, **of_both, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


def ended(processes: Sequence[WarmProcess]) -> list[subprocess.CompletedProcess[str]]:
    outputs = [process.communicate(timeout=120) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.wait(), *texts)
        for process, texts in zip(processes, outputs, strict=True)
    ]


def together(*arguments: str | Path) -> list[subprocess.CompletedProcess[str]]:
    return ended(start_two(*arguments))


def copied(run: Path, to: Path, *parts: str) -> Path:
    """Copy parts of a run folder."""
    for part in parts:
        shutil.copytree(run / part, to / part)
    return to


def files_of(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def student_of(run: Path, kind: str) -> dict[str, torch.Tensor]:
    return load_tensors(run / "students" / f"{kind}-seed0" / "model.safetensors")[0]


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "students" / f"{kind}-seed0" / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "wall_s"} for line in lines]


def assert_close(run: Path, other: Path, kind: str) -> None:
    found, expected = student_of(run, kind), student_of(other, kind)
    assert found.keys() == expected.keys()
    for name, weights in found.items():
        assert torch.allclose(weights, expected[name], rtol=1e-3, atol=1e-4), name


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "several.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def two(tmp_path_factory, recipe):
    """A run of two processes, and the output of the last stage."""
    run = tmp_path_factory.mktemp("two") / "run"
    for command in ("train-teacher", "cache-teacher", "train-student"):
        both = together(command, recipe, "--run", run)
        assert [process.returncode for process in both] == [0, 0], [process.stderr for process in both]
    return run, both


@pytest.fixture(scope="module")
def single(tmp_path_factory, recipe, two):
    """The same students from the same store, trained by one process."""
    run = copied(two[0], tmp_path_factory.mktemp("one"), "teacher", "store.zarr", "store.test.zarr")
    assert kdpipe("train-student", recipe, "--run", run).returncode == 0
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_the_student_of_one(single, two, kind):
    assert_close(two[0], single, kind)
    for found, expected in zip(lines_of(two[0], kind), lines_of(single, kind), strict=True):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert found["cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-4)
        assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=2 / 359)


def test_only_the_first_process_writes_and_prints(single, two):
    run, (first, second) = two
    assert files_of(run / "students") == files_of(single / "students")
    assert "student distilled" in first.stdout
    assert second.stdout == "" and (second.stderr == "" or DEVICE.type == "cuda")  # where each warns of its own GPU
    assert "train-student" not in second.stderr


def test_a_signal_to_one_process_stops_both_and_they_resume(tmp_path, recipe, two):
    run = copied(two[0], tmp_path / "run", "teacher", "store.zarr", "store.test.zarr")
    checkpoint = run / "students" / "distilled-seed0" / "checkpoint.safetensors"
    both = start_two("train-student", recipe, "--run", run)
    signal_when(both[1], checkpoint.exists, signal.SIGTERM)
    assert [process.returncode for process in ended(both)] == [75, 75]
    assert checkpoint.exists()
    alone = copied(run, tmp_path / "alone", "teacher", "store.zarr", "store.test.zarr", "students")
    assert [process.returncode for process in together("train-student", recipe, "--run", run)] == [0, 0]
    model = Path("students", "distilled-seed0", "model.safetensors")
    assert (run / model).read_bytes() == (two[0] / model).read_bytes()
    assert lines_of(run, "distilled") == lines_of(two[0], "distilled")
    assert kdpipe("train-student", recipe, "--run", alone).returncode == 0  # a single process can resume what two began
    assert_close(alone, two[0], "distilled")


def test_if_one_process_is_killed_the_other_reports_it(tmp_path, recipe, two):
    run = copied(two[0], tmp_path / "run", "teacher", "store.zarr", "store.test.zarr")
    checkpoint = run / "students" / "distilled-seed0" / "checkpoint.safetensors"
    both = start_two("train-student", recipe, "--run", run)
    signal_when(both[0], checkpoint.exists, signal.SIGKILL)
    first, second = ended(both)
    assert (first.returncode, second.returncode) == (-signal.SIGKILL, 1)
    *warnings, error = second.stderr.splitlines()
    assert error.startswith("kdpipe: error: another of the 2 processes of this job ended")
    assert warnings == [] or DEVICE.type == "cuda"


def test_a_changed_recipe_is_refused_by_both_processes(recipe, two):
    both = together("train-student", recipe, "--run", two[0], "--set", "student.train.lr=0.03")
    assert [process.returncode for process in both] == [12, 12]
    assert "train.lr: stored 0.02, wanted 0.03" in both[0].stderr


def test_an_indivisible_batch_size_is_refused(tmp_path, recipe):
    both = together("train-teacher", recipe, "--run", tmp_path, "--set", "teacher.train.batch_size=33")
    assert [process.returncode for process in both] == [2, 2]
    assert "train.batch_size is 33" in both[0].stderr
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("command", ["compress", "run", "generations"])
def test_single_process_commands_refuse_several(tmp_path, recipe, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        ended = kdpipe_here(command, recipe, "--run", tmp_path / "run")
        assert ended.exit_code == 2
    assert ended.stderr.startswith(f"kdpipe: error: kdpipe {command} runs in one process, and 2 were started")
    assert not (tmp_path / "run").exists()
