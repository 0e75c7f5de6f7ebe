"""The Python API against the command line: the same files, byte for byte, in the same folders."""

import shutil

import pytest
import torch
from support.compare_runs import differing_files
from support.device import DEVICE
from support.kdpipe_process import kdpipe_here

import kdpipe as kd

TRAIN = {"epochs": 6, "batch_size": 32}
FINE_TUNE = {"epochs": 4, "batch_size": 32}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the recipe
    yield
    torch.set_num_threads(before)


def run_in_python(run):
    """Do in Python what `kdpipe run tiny.toml` does."""
    train, test = kd.load_dataset("digits", num_train=200)
    teacher = kd.create_model("cnn", train, width=8)
    views = kd.Views(30, [{"name": "RandomCrop", "padding": 1}])
    work = {"run": run, "device": DEVICE, "progress": False}
    kd.train_teacher(teacher, train, test=test, views=views, **work, **TRAIN)
    cache = {"device": DEVICE, "progress": False, "batch_size": 64}
    store = kd.cache_teacher(teacher, train, run / "store.zarr", test=test, views=views, features=["stage2"], **cache)
    model = {"model_args": {"width": 4}}
    alone = kd.train_student("cnn", train, test=test, views=views, **model, **work, **TRAIN)
    losses = [kd.losses.KD(), kd.losses.Hint([("stage2", "stage2")], weight=0.5)]
    result = kd.train_student("cnn", train, store, test=test, losses=losses, **model, **work, **TRAIN)
    small = kd.compress(
        result,
        train,
        store,
        prune={"ratio": 0.25, "round_to": 1},
        prune_train={**FINE_TUNE, "lr": 0.02},
        quantize_train={**FINE_TUNE, "lr": 0.002},
        latency_rounds=3,
        niceness=0,
        device=DEVICE,
        progress=False,
    )
    return alone, result, small


@pytest.fixture(scope="module")
def in_python(tmp_path_factory):
    run = tmp_path_factory.mktemp("python") / "run"
    return run, *run_in_python(run)


def test_python_and_command_line_give_equal_bytes(done, in_python):
    assert differing_files(in_python[0], done[0]) == []


def test_python_finds_what_the_command_line_has_done(done, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(done[0], run)
    stamps = {path: path.stat().st_mtime_ns for path in run.rglob("model.safetensors")}
    _, result, small = run_in_python(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("model.safetensors")} == stamps
    assert result.accuracy > 0.3
    assert small.folder == run / "compressed" / "artifacts-seed0"


def test_command_line_reports_what_python_has_done(in_python):
    reported = kdpipe_here("report", in_python[0], "--json")
    assert reported.exit_code == 0, reported.stderr
    assert "pruned + INT8" in reported.stdout


def test_results_have_figures_and_networks(in_python, tmp_path):
    _, alone, result, small = in_python
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert alone.agreement is None or 0 <= alone.agreement <= 1
    assert 0 < result.accuracy <= result.best_accuracy <= 1
    assert [line["epoch"] for line in result.history] == list(range(6))
    assert result.bundle(images).shape == (2, 10)
    assert small.accuracy == small.networks["int8"].accuracy
    assert small.networks["pruned"].num_parameters < result.num_parameters
    assert torch.equal(kd.load_student(small.folder / "int8")(images), small.bundle(images))
    for name in ("student.onnx", "student.safetensors", "student.pt2"):
        assert small.export(tmp_path / name).stat().st_size > 0
    assert small.export(tmp_path / "again.onnx").read_bytes() == (small.folder / "int8" / "model.onnx").read_bytes()
    with pytest.raises(kd.KdpipeError, match="choose from .onnx"):
        result.export(tmp_path / "student.tflite")
