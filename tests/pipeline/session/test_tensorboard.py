"""TensorBoard scalars: tags and folders, resumed jobs, and errors that must not end a job."""

import sys
from types import SimpleNamespace

import pytest

from kdpipe.pipeline.session import tensorboard
from kdpipe.pipeline.session.tensorboard import folder_name, scalars
from kdpipe.stages.runtime.events import WARNING, ProgressEvent


class Writer:
    """Fake of torch's SummaryWriter, which needs the package tensorboard."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.points, self.is_closed = folder, purge_step, [], False
        self.made.append(self)

    def add_scalar(self, tag, value, step):
        self.points.append((tag, value, step))

    def close(self):
        self.is_closed = True


@pytest.fixture
def writers(monkeypatch):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: object())
    monkeypatch.setattr(Writer, "made", [], raising=False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    return Writer.made


def epoch(number, job="distilled student, seed 0", **metrics):
    return ProgressEvent("train-student", job, number + 1, 3, "step", {"epoch": number, **metrics})


def test_each_job_has_its_metrics_by_epoch(tmp_path, writers):
    with scalars(tmp_path) as report:
        report(ProgressEvent("train-student", "distilled student, seed 0", 1, 3, "step"))
        report(ProgressEvent("data", "a warning", 1, 1, WARNING))
        report(epoch(0, accuracy=0.5, losses={"kd": 2.0}, lr=0.1, examined=None))
        report(epoch(1, "alone student, seed 0"))
    distilled, alone = writers
    assert distilled.folder == str(tmp_path / "tensorboard" / "distilled-student-seed-0")
    assert sorted(distilled.points) == [("loss/kd", 2.0, 0), ("lr", 0.1, 0), ("test/accuracy", 0.5, 0)]
    assert (alone.points, distilled.is_closed, alone.is_closed) == ([], True, True)


def test_a_resumed_job_replaces_its_epochs(tmp_path, writers):
    with scalars(tmp_path) as report:
        report(epoch(1, accuracy=0.5))
        report(epoch(2, accuracy=0.6))
    assert [writer.purge_step for writer in writers] == [1]


def test_a_missing_package_is_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with scalars(tmp_path) as report:
        report(epoch(0, accuracy=0.5))
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "uv sync --extra tensorboard" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_write_error_is_one_warning_and_ends_no_job(tmp_path, writers, monkeypatch, capsys):
    monkeypatch.setattr(Writer, "add_scalar", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with scalars(tmp_path) as report:
        for number in range(3):
            report(epoch(number, accuracy=0.5))
    assert capsys.readouterr().err.count("kdpipe: warning: ") == 1


@pytest.mark.parametrize("job", ["../../etc", "\0", "数", "a" * 500, ""])
def test_a_job_name_becomes_a_safe_folder_name(job):
    name = folder_name(job)
    assert name.isascii()
    assert 0 < len(name) <= 100
    assert "/" not in name
    assert not name.startswith(".")
