"""CSV and TensorBoard: their lines and tags, resumed trainings, and errors that must not end a job."""

import csv
import sys
from types import SimpleNamespace

import pytest
from support.tiny_run import TEACHER, StopAfter, tiny_context

from kdpipe.pipeline.callbacks import files
from kdpipe.pipeline.callbacks.files import CSVLogger, TensorBoardLogger
from kdpipe.pipeline.callbacks.metrics_logger import folder_name
from kdpipe.pipeline.steps import train_teacher
from kdpipe.stages.errors import StoppedEarly
from kdpipe.stages.runtime.callbacks import CallbackState
from kdpipe.stages.runtime.events import WARNING, RunMonitor


def state_of(folder, *history, job="distilled student, seed 0", warn=print):
    """The state of a training after some epochs."""
    return CallbackState(
        stage="train-student",
        job=job,
        seed=0,
        folder=folder,
        run_dir=folder,
        model=None,
        config={},
        epoch=len(history),
        num_epochs=3,
        global_step=9 * len(history),
        steps_per_epoch=9,
        history=history,
        mean_losses=dict,
        warn=warn,
    )


def train(folder, callback, **more):
    """Train the tiny teacher; return the warnings, but for that of its accuracy."""
    events = []
    monitor = RunMonitor(events.append, callbacks=(callback,), run_dir=folder, **more)
    train_teacher(TEACHER, 0, tiny_context(folder, monitor))
    return [event.job for event in events if event.unit == WARNING and "is not clearly above chance" not in event.job]


def test_a_resumed_training_repeats_no_line_of_the_csv_file(tmp_path):
    with pytest.raises(StoppedEarly):
        train(tmp_path, CSVLogger(), should_stop=StopAfter(20))  # of 9 steps an epoch, and evaluations
    train(tmp_path, CSVLogger())
    with (tmp_path / "teacher" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert {"test/accuracy", "test/cross_entropy", "loss/hard_labels", "lr", "epoch_wall_s"} <= set(rows[0])


class Writer:
    """Fake of torch's SummaryWriter, which needs the package tensorboard."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.points, self.is_closed = folder, purge_step, [], False
        self.made.append(self)

    def add_scalar(self, tag, value, step):
        self.points.append((tag, value, step))

    def flush(self):
        pass

    def close(self):
        self.is_closed = True


@pytest.fixture
def writers(monkeypatch):
    monkeypatch.setattr(files, "find_spec", lambda name: object())
    monkeypatch.setattr(Writer, "made", [], raising=False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    return Writer.made


def test_each_training_has_its_scalars_by_epoch(tmp_path, writers):
    callback = TensorBoardLogger()
    epoch = {"epoch": 0, "accuracy": 0.5, "losses": {"kd": 2.0}, "lr": 0.1, "stopped_by": "x"}
    for job in ("distilled student, seed 0", "alone student, seed 0"):
        callback.on_run_start(state_of(tmp_path, job=job))
        callback.on_epoch_end(state_of(tmp_path, epoch, job=job))
        callback.on_run_end(state_of(tmp_path, epoch, job=job))
    distilled, alone = writers
    assert distilled.folder == str(tmp_path / "tensorboard" / "distilled-student-seed-0")
    assert sorted(distilled.points) == [("loss/kd", 2.0, 0), ("lr", 0.1, 0), ("test/accuracy", 0.5, 0)]
    assert (distilled.is_closed, alone.is_closed) == (True, True)


def test_a_resumed_training_replaces_its_scalars(tmp_path, writers):
    callback, epochs = TensorBoardLogger(), [{"epoch": number, "accuracy": 0.5} for number in range(3)]
    callback.on_run_start(state_of(tmp_path, *epochs[:1]))
    for count in (2, 3):
        callback.on_epoch_end(state_of(tmp_path, *epochs[:count]))
    assert [writer.purge_step for writer in writers] == [1]


def test_a_missing_package_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    (warning,) = train(tmp_path, TensorBoardLogger())
    assert "`uv sync --extra tensorboard`" in warning
    assert not (tmp_path / "tensorboard").exists()


def test_a_write_error_is_one_warning_and_ends_no_job(tmp_path, writers, monkeypatch):
    monkeypatch.setattr(Writer, "add_scalar", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    warnings, callback = [], TensorBoardLogger()
    epochs = [{"epoch": number, "accuracy": 0.5} for number in range(3)]
    callback.on_run_start(state_of(tmp_path, warn=warnings.append))
    for count in (1, 2, 3):
        callback.on_epoch_end(state_of(tmp_path, *epochs[:count], warn=warnings.append))
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]


def test_torch_writes_scalars_that_tensorboard_reads(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    callback = TensorBoardLogger()
    with pytest.raises(StoppedEarly):
        train(tmp_path, callback, should_stop=StopAfter(20))
    train(tmp_path, callback)
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "teacher")).Reload()
    assert [point.step for point in found.Scalars("test/accuracy")] == [0, 1]


@pytest.mark.parametrize("job", ["../../etc", "\0", "数", "a" * 500, ""])
def test_a_job_name_becomes_a_safe_folder_name(job):
    name = folder_name(job)
    assert name.isascii()
    assert 0 < len(name) <= 100
    assert "/" not in name
    assert not name.startswith(".")
