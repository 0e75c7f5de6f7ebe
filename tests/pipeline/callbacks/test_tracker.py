"""Experiment trackers: offline runs that resume, the recipe as their configuration, and packages that are missing."""

import sqlite3
from importlib.util import find_spec

import pytest
from support.tiny_run import TEACHER, StopAfter, tiny_context

from kdpipe.pipeline.callbacks import tracker
from kdpipe.pipeline.callbacks.public_config import public_config
from kdpipe.pipeline.callbacks.tracker import Tracker
from kdpipe.pipeline.steps import train_teacher
from kdpipe.stages.errors import StoppedEarly
from kdpipe.stages.runtime.events import WARNING, RunMonitor

CONFIG = {"name": "tiny", "teacher": {"train": {"lr": 0.05}}}


def train(folder, callback, **more):
    """Train the tiny teacher; return the warnings, but for that of its accuracy."""
    events = []
    monitor = RunMonitor(events.append, callbacks=(callback,), config=CONFIG, run_dir=folder, **more)
    train_teacher(TEACHER, 0, tiny_context(folder, monitor))
    return [event.job for event in events if event.unit == WARNING and "is not clearly above chance" not in event.job]


def train_with_a_stop(folder, backend):
    """Train with a stop in the second epoch."""
    with pytest.raises(StoppedEarly):
        train(folder, Tracker(backend), should_stop=StopAfter(14))
    assert train(folder, Tracker(backend)) == []


@pytest.mark.slow
def test_weights_and_biases_works_offline_in_the_run_folder(tmp_path, monkeypatch):
    for package in ("wandb", "accelerate"):
        pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    train_with_a_stop(tmp_path / "run", "wandb")
    runs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 2
    assert len({path.name for path in runs}) == 1  # one run, by its id, in two parts
    assert b"teacher.train.lr" in runs[0].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_mlflow_continues_the_run_of_a_stopped_training(tmp_path, monkeypatch):
    for package in ("mlflow", "accelerate", "sqlalchemy"):
        pytest.importorskip(package)
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    try:
        train_with_a_stop(tmp_path / "run", "mlflow")
    finally:
        mlflow.set_tracking_uri(None)
    with sqlite3.connect(tmp_path / "run" / "mlflow.db") as database:
        assert database.execute("select name, status from runs").fetchall() == [("teacher", "FINISHED")]
        steps = database.execute("select step from metrics where key = 'test/accuracy' order by step").fetchall()
        assert steps == [(0,), (1,)]
        assert ("teacher.train.lr", "0.05") in database.execute("select key, value from params").fetchall()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_trackers_set_up_no_process_group_of_accelerate(tmp_path, monkeypatch):
    state = pytest.importorskip("accelerate.state")
    from accelerate import tracking

    class Started(tracking.GeneralTracker):
        name, requires_logging_directory, tracker, calls = "aim", False, None, []

        def __init__(self, run_name, **settings):
            super().__init__()
            self.calls.append((run_name, settings["experiment"]))

        @tracking.on_main_process
        def start(self):
            tracking.logger.debug("started")

        @tracking.on_main_process
        def log(self, values, step=None, **settings):
            self.calls.append((step, sorted(values)[0]))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "aim", Started)
    monkeypatch.setattr(tracker, "find_spec", lambda name: object())
    monkeypatch.setitem(tracker.ID_OF, "aim", lambda run: "1")
    before = dict(state.PartialState._shared_state)
    assert train(tmp_path, Tracker("aim")) == []
    assert Started.calls == [("teacher", "tiny"), (0, "epoch_wall_s"), (1, "epoch_wall_s")]
    assert dict(state.PartialState._shared_state) == before


@pytest.mark.parametrize(
    ("backend", "missing", "advice"),
    [
        ("wandb", "wandb", "pip install 'kdpipe[wandb]'"),
        ("mlflow", "accelerate", "pip install 'kdpipe[mlflow]'"),
        ("aim", "aim", "pip install aim"),
    ],
)
def test_a_missing_package_is_one_warning(tmp_path, monkeypatch, backend, missing, advice):
    monkeypatch.setattr(tracker, "find_spec", lambda name: None if name == missing else object())
    (warning,) = train(tmp_path, Tracker(backend))
    assert f"the package {missing} is not installed" in warning
    assert advice in warning
    assert "goes on" in warning


def test_a_failing_tracker_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(tracker, "_tracker_class", lambda backend: (_ for _ in ()).throw(ConnectionError("no network")))
    (warning,) = train(tmp_path, Tracker("wandb"))
    assert warning.startswith("wandb failed (ConnectionError: no network). The job goes on")


def test_the_configuration_has_no_secrets_and_no_host_paths():
    recipe = {
        "name": "x",
        "seed": 0,
        "callbacks": [{"name": "wandb", "anonymous": "must"}],
        "data": {"name": "imagefolder:/home/me/pictures", "root": "/home/me/data", "num_train": None},
        "student": {"stores": ["s3://key:word@bucket/a.zarr?token=1", "~/b.zarr"], "seeds": (0, 1)},
        "teacher": {"model": {"args": {"hub_token": "1", "width": 8}, "weights": "weights/teacher.pt"}},
        "distill": [{"loss": "kd", "weight": {"start": 1.0}}],
    }
    assert public_config(recipe) == {
        "name": "x",
        "seed": 0,
        "data.name": "imagefolder:pictures",
        "data.root": "data",
        "data.num_train": None,
        "student.stores": '["s3://...@bucket/a.zarr?...", "b.zarr"]',
        "student.seeds": "[0, 1]",
        "teacher.model.args.width": 8,
        "teacher.model.weights": "weights/teacher.pt",
        "distill.0.loss": "kd",
        "distill.0.weight.start": 1.0,
    }


def test_every_tracker_of_accelerate_is_known():
    if find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed")
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert {*tracker.SETTINGS, "tensorboard"} <= set(LOGGER_TYPE_TO_CLASS)
