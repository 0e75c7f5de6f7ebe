"""Experiment trackers such as Weights & Biases and MLflow, through `accelerate.tracking`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from kdpipe.pipeline.callbacks.metrics_logger import MetricsLogger, Unavailable, folder_name, scalars_of
from kdpipe.pipeline.callbacks.public_config import public_config
from kdpipe.stages.runtime.callbacks import CallbackState

EXTRAS = ("wandb", "mlflow", "trackio")
"""The trackers with an extra of kdpipe; others are installed by their own name."""

Settings = dict[str, Any]


class Tracker(MetricsLogger):
    """Logs each training as a run of an experiment tracker: project = recipe, run = training, step = epoch.

    Attributes:
        backend: The name of the tracker in `accelerate.tracking`.
        settings: Further arguments of the tracker, such as `entity` and `tags` of `wandb.init`.
    """

    def __init__(self, backend: str, **settings: Any) -> None:
        self.backend, self.settings = backend, settings
        self._run_id: str | None = None
        self._tracker: Any = None

    @property
    def name(self) -> str:
        """The name of the tracker."""
        return self.backend

    def state_dict(self) -> dict[str, Any]:
        """Return the id of the tracker's run, which a resumed training continues."""
        return {"run_id": self._run_id} if self._run_id else {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue the tracker's run, or begin one."""
        self._run_id, self._tracker = saved.get("run_id"), None

    def start(self, state: CallbackState) -> None:
        """Open the tracker's run; a new one gets the recipe as its configuration."""
        if state.epoch >= state.num_epochs:  # only the export is left
            return
        kind = _tracker_class(self.backend)
        is_new, run_id = self._run_id is None, self._run_id or uuid.uuid4().hex
        settings = SETTINGS[self.backend](state, run_id, is_new) | self.settings
        self._tracker = kind(settings.pop("project", _project(state)), **settings)
        self._tracker.main_process_only = False  # else it would set up accelerate's own process group and device
        self._tracker.start()
        self._run_id = str(ID_OF[self.backend](self._tracker.tracker)) if self.backend in ID_OF else run_id
        if is_new:
            self._tracker.store_init_configuration(_config(state))

    def log(self, state: CallbackState) -> None:
        """Log an epoch."""
        self._tracker.log(scalars_of(state.metrics), step=state.metrics["epoch"])

    def finish(self, state: CallbackState) -> None:
        """Close the tracker's run."""
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None


def _tracker_class(backend: str) -> Any:
    """Return accelerate's class for a tracker. Raises Unavailable if it, or the tracker, is not installed."""
    missing = [name for name in ("accelerate", backend) if find_spec(name) is None]
    if missing:
        extra = f"'kdpipe[{backend}]'" if backend in EXTRAS else " ".join(missing)
        raise Unavailable(
            f"{backend} logs nothing because the package {' and '.join(missing)} is not installed: run "
            f"`pip install {extra}`"
        )
    from accelerate import tracking

    # accelerate's logger refuses to work before its own process group and device are set up.
    tracking.logger.log = tracking.logger.logger.log
    return tracking.LOGGER_TYPE_TO_CLASS[backend]


def _project(state: CallbackState) -> str:
    """Return the recipe's name; without a recipe that of the run folder."""
    return str(state.config.get("name") or state.run_dir.absolute().name)


def _config(state: CallbackState) -> dict[str, Any]:
    return {**public_config(state.config), "stage": state.stage, "job": state.job, "job_seed": state.seed}


def _mlflow(state: CallbackState, run_id: str, is_new: bool) -> Settings:
    mlflow: Any = import_module("mlflow")
    settings = {"run_name": state.job, "run_id": None if is_new else run_id}
    if not mlflow.is_tracking_uri_set():
        mlflow.set_tracking_uri(f"sqlite:///{state.run_dir.absolute()}/mlflow.db")
        settings["logging_dir"] = str(state.run_dir.absolute() / "mlruns")
    return settings


def _trackio(state: CallbackState, run_id: str, is_new: bool) -> Settings:
    """Return its arguments with the configuration, which it stores only at the start."""
    return {"name": state.job, "resume": "never" if is_new else "allow", "config": _config(state)}


def _clearml(state: CallbackState, run_id: str, is_new: bool) -> Settings:
    return {"task_name": state.job, "reuse_last_task_id": False, "continue_last_task": False if is_new else run_id}


SETTINGS: dict[str, Callable[[CallbackState, str, bool], Settings]] = {
    "wandb": lambda state, run_id, is_new: {
        "name": state.job,
        "id": run_id,
        "resume": "never" if is_new else "allow",
        "dir": str(state.run_dir),
    },
    "mlflow": _mlflow,
    "trackio": _trackio,
    "comet_ml": lambda state, run_id, is_new: {"experiment_key": run_id},
    "aim": lambda state, run_id, is_new: {
        "project": state.job,
        "experiment": _project(state),
        "logging_dir": str(state.run_dir),
        "run_hash": None if is_new else run_id,
    },
    "clearml": _clearml,
    "dvclive": lambda state, run_id, is_new: {
        "dir": str(state.run_dir / "dvclive" / folder_name(state.job)),
        "resume": not is_new,
    },
    "swanlab": lambda state, run_id, is_new: {
        "experiment_name": state.job,
        "id": run_id,
        "resume": "never" if is_new else "allow",
        "logdir": str(state.run_dir / "swanlog"),
    },
}
"""The arguments of each tracker, from the training, the id of its run, and whether that is new."""

ID_OF: dict[str, Callable[[Any], Any]] = {
    "mlflow": lambda run: run.info.run_id,
    "aim": lambda run: run.hash,
    "clearml": lambda task: task.id,
    "trackio": lambda run: run.name,
}
"""How to read the id of a run where the tracker chooses it."""
