"""Tests of training jobs: resuming, refusing other inputs, errors."""

import dataclasses
import json

import pytest
import torch
from support.tiny_run import STUDENT, TEACHER, TRAIN, StopAfter, make_tiny_store, open_tiny_spec, tiny_context
from support.tiny_training import trained

from kdpipe.pipeline.steps import train_student, train_teacher
from kdpipe.stages.distillation.student_config import student_folder
from kdpipe.stages.errors import NotFiniteError, RecipeError, RunError, StoppedEarly
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.safetensors_io import load_tensors, save_tensors
from kdpipe.stages.runtime import circumstances
from kdpipe.stages.runtime.distributed import SINGLE
from kdpipe.stages.runtime.events import WARNING, RunMonitor
from kdpipe.stages.teacher import TeacherConfig, load_teacher
from kdpipe.stages.training.job_dir import JobDir, note_on_old_jobs, sweep_run
from kdpipe.store import FingerprintMismatch
from kdpipe.store.fs.checksums import SUMS, DamagedFileError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    context = tiny_context(folder)
    path = make_tiny_store(context)
    train_student(STUDENT, 0, open_tiny_spec(path, context), context)
    return folder


def metrics_of(folder: JobDir):
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "wall_s"} for line in lines]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_stopped_and_resumed_job_is_bit_identical(run, tmp_path, optimizer):
    config = dataclasses.replace(STUDENT, train=dataclasses.replace(TRAIN, optimizer=optimizer, lr=0.01, momentum=0.9))
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    context = tiny_context(whole)
    train_student(config, 0, open_tiny_spec(run / "store.zarr", context), context)
    num_stops = 0
    while student_folder(pieces, "distilled", 0).result() is None:
        context = tiny_context(pieces, RunMonitor(should_stop=StopAfter(1 + num_stops % 4)))
        try:
            train_student(config, 0, open_tiny_spec(run / "store.zarr", context), context)
        except StoppedEarly:
            num_stops += 1
    one, other = student_folder(whole, "distilled", 0), student_folder(pieces, "distilled", 0)
    assert num_stops > 8
    assert one.model.read_bytes() == other.model.read_bytes()
    assert one.onnx.read_bytes() == other.onnx.read_bytes()
    assert metrics_of(one) == metrics_of(other)


def test_a_finished_job_is_not_touched(run):
    context = tiny_context(run)
    before = student_folder(run, "distilled", 0).model.stat().st_mtime_ns
    result = train_student(STUDENT, 0, open_tiny_spec(run / "store.zarr", context), context)
    assert result == student_folder(run, "distilled", 0).result()
    assert student_folder(run, "distilled", 0).model.stat().st_mtime_ns == before


def test_both_students_start_from_the_same_weights(run, tmp_path):
    """The baseline is trained alike: with every distillation weight at zero the two students are one."""
    context = tiny_context(tmp_path)
    spec = open_tiny_spec(run / "store.zarr", context)
    silent = dataclasses.replace(
        spec, losses=[dataclasses.replace(loss, weight=0.0) for loss in spec.losses], hard_label_weight=1.0
    )
    train_student(STUDENT, 0, None, context)
    train_student(STUDENT, 0, silent, context)
    alone, silenced = (load_tensors(student_folder(tmp_path, kind, 0).model)[0] for kind in ("alone", "distilled"))
    assert all(torch.equal(alone[name], silenced[name]) for name in alone)
    distilled = load_tensors(student_folder(run, "distilled", 0).model)[0]
    assert any(not torch.equal(alone[name], distilled[name]) for name in alone)


def test_another_recipe_in_the_same_folder_is_an_error(run):
    context = tiny_context(run)
    other = dataclasses.replace(STUDENT, train=dataclasses.replace(TRAIN, lr=0.02))
    with pytest.raises(FingerprintMismatch, match=r"train.lr: stored 0.05, wanted 0.02"):
        train_student(other, 0, open_tiny_spec(run / "store.zarr", context), context)


def test_checkpoint_interval_is_not_part_of_the_job(run):
    context = tiny_context(run)
    other = dataclasses.replace(STUDENT, train=dataclasses.replace(TRAIN, checkpoint_every_s=1000))
    train_student(other, 0, open_tiny_spec(run / "store.zarr", context), context)


def test_diverging_loss_is_an_error(tmp_path):
    config = dataclasses.replace(TEACHER, train=dataclasses.replace(TRAIN, lr=1e6, weight_decay=1e6))
    with pytest.raises(NotFiniteError, match="lower lr"):
        train_teacher(config, 0, tiny_context(tmp_path))


def test_damaged_checkpoint_error_says_what_to_delete(tmp_path):
    context = tiny_context(tmp_path, RunMonitor(should_stop=StopAfter(3)))
    with pytest.raises(StoppedEarly):
        train_teacher(TEACHER, 0, context)
    checkpoint = tmp_path / "teacher" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-10])
    with pytest.raises(Exception, match=r"checkpoint.safetensors .*delete it"):
        train_teacher(TEACHER, 0, tiny_context(tmp_path))


def test_a_resumed_job_uses_the_threads_that_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr(circumstances, "num_cores", lambda: 2)
    told, before = [], torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(StoppedEarly):
            trained(tmp_path, RunMonitor(should_stop=StopAfter(3)))
        torch.set_num_threads(1)
        used = set()
        trained(tmp_path, RunMonitor(lambda event: (told.append(event), used.add(torch.get_num_threads()))))
        assert 2 in used and torch.get_num_threads() == 1, "for this job only"
    finally:
        torch.set_num_threads(before)
    warnings = [event.job for event in told if event.unit == WARNING]
    assert warnings[0] == "test continues with 2 threads, as it began, for the same results."


@pytest.mark.parametrize(
    ("made_with", "words"),
    [
        ({"threads": 64}, ["threads '64' and now"]),
        ({"device": "cuda", "torch": "1.0"}, ["device 'cuda' and now 'cpu'", "torch '1.0' and now"]),
        ({}, []),
    ],
)
def test_a_job_resumed_in_other_circumstances_says_so(monkeypatch, made_with, words):
    monkeypatch.setattr(circumstances, "num_cores", lambda: 2)
    told = []
    circumstances.resume_circumstances(made_with, "teacher", torch.device("cpu"), SINGLE, RunMonitor(told.append))
    assert [all(word in event.job for word in words) for event in told] == [True] * bool(words)


def test_a_finished_job_is_checked_and_tidied(tmp_path, without_onnx):
    train_teacher(TEACHER, 0, tiny_context(tmp_path))
    folder = JobDir(tmp_path / "teacher")
    folder.checkpoint.write_bytes(b"left")  # could not be removed
    train_teacher(TEACHER, 0, tiny_context(tmp_path))
    assert not folder.checkpoint.exists()
    folder.metrics.write_text(folder.metrics.read_text().replace("0", "1", 1))
    with pytest.raises(DamagedFileError, match=r"metrics\.jsonl is damaged or was edited: .* delete the folder"):
        train_teacher(TEACHER, 0, tiny_context(tmp_path))


def test_damaged_weights_are_not_called_another_network(tmp_path, without_onnx):
    train_teacher(TEACHER, 0, tiny_context(tmp_path))
    folder = JobDir(tmp_path / "teacher")
    (folder.path / SUMS).unlink()  # as in a folder of an older kdpipe
    tensors, record = load_tensors(folder.model)
    save_tensors(folder.model, {name: tensor + 1 for name, tensor in tensors.items()}, record)
    with pytest.raises(
        RunError, match=r"model\.safetensors does not hold the weights that .* is damaged or was replaced"
    ):
        load_teacher(TEACHER, 0, tiny_context(tmp_path))
    assert f"{tmp_path}, such as teacher, have no SHA256SUMS" in str(note_on_old_jobs_without(tmp_path))


def note_on_old_jobs_without(run):
    (run / "teacher" / SUMS).unlink()
    return note_on_old_jobs(run)


def test_leftovers_of_killed_writers_are_removed_from_a_run(tmp_path):
    kept = [tmp_path / ".report.html.1.partial", tmp_path / "store.zarr" / ".zarr.json.1.partial"]
    litter = [tmp_path / ".recipe.json.1.partial", tmp_path / "compressed" / ".SHA256SUMS.1.partial"]
    for path in [*kept, *litter]:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    sweep_run(tmp_path)
    assert [path.exists() for path in [*kept, *litter]] == [True, True, False, False]


def test_a_teacher_needs_weights_or_training(tmp_path):
    with pytest.raises(RecipeError, match="neither"):
        train_teacher(TeacherConfig(model=ModelConfig(name="cnn")), 0, tiny_context(tmp_path))


def test_teacher_with_weights_is_not_trained(run, tmp_path):
    model = dataclasses.replace(TEACHER.model, weights=str(run / "teacher" / "model.safetensors"))
    result = train_teacher(TeacherConfig(model=model), 0, tiny_context(tmp_path))
    trained = JobDir(run / "teacher").result()
    assert result["identity"]["weights_sha256"] == trained["identity"]["weights_sha256"]
    assert result["accuracy"] == trained["accuracy"]


def test_given_weights_are_evaluated_on_the_device(run, tmp_path, monkeypatch):
    devices = []
    monkeypatch.setattr(
        "kdpipe.pipeline.steps.finalize", lambda job, teacher, *_, **__: devices.append(teacher.model.fc.weight.device)
    )
    model = dataclasses.replace(TEACHER.model, weights=str(run / "teacher" / "model.safetensors"))
    train_teacher(TeacherConfig(model=model), 0, tiny_context(tmp_path, device=torch.device("meta")))
    assert devices == [torch.device("meta")]


def test_missing_teacher_error_names_the_command(tmp_path):
    with pytest.raises(RunError, match="kdpipe train-teacher"):
        load_teacher(TEACHER, 0, tiny_context(tmp_path))


def test_last_and_best_epoch_are_reported(run):
    folder = student_folder(run, "distilled", 0)
    result, lines = folder.result(), metrics_of(folder)
    assert result["accuracy"] == lines[-1]["accuracy"]
    assert result["best_accuracy"] == max(line["accuracy"] for line in lines)
    assert lines[result["best_epoch"]]["accuracy"] == result["best_accuracy"]
    assert set(lines[0]["losses"]) == {"hard_labels", "kd_0", "hint_1"}
