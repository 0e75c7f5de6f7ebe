"""Call the callbacks of a training: in the first process only, with their wish to stop known to all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from kdpipe.stages.errors import RunError, cause
from kdpipe.stages.runtime.callbacks import HOOKS, Callback, CallbackState
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.training.checkpoint import Progress
from kdpipe.stages.training.job import TrainJob, num_steps_of


class Hooks:
    """The callbacks of a training, by name. Use `callbacks_of` to create it."""

    def __init__(self, job: TrainJob, progress: Progress, monitor: RunMonitor) -> None:
        self._job, self._progress, self._monitor = job, progress, monitor
        self._config = monitor.config or {"train": asdict(job.config)}
        self._callbacks: dict[str, Callback] = {}
        for callback in monitor.callbacks:
            same = sum(other.name == callback.name for other in self._callbacks.values())
            self._callbacks[f"{callback.name} {same + 1}" if same else callback.name] = callback
        used = {hook: [n for n, one in self._callbacks.items() if _overrides(one, hook)] for hook in HOOKS}
        self._names = {hook: names for hook, names in used.items() if names}

    def call(self, hook: str) -> None:
        """Call a hook of all callbacks that have it. All processes must call this.

        Raises:
            RunError: A callback failed.
        """
        if hook in self._names:
            stopped_by = self._job.process_group.on_main(partial(self._call, hook))
            self._progress.stopped_by = self._progress.stopped_by or stopped_by

    def start(self) -> None:
        """Give the callbacks the state in the checkpoint, and call `on_run_start`. Raises as `call` does."""

        def load() -> None:
            for name, callback in self._callbacks.items():
                with _failure_of(name, "load_state_dict"):
                    callback.load_state_dict(self._progress.callbacks.get(name, {}))

        if self._callbacks:
            self._job.process_group.on_main(load)
        self.call("on_run_start")

    def interrupt(self, error: BaseException) -> None:
        """Call `on_run_end` after an error, in this process alone; what fails then is a warning."""
        for name in self._names.get("on_run_end", ()) if self._job.process_group.is_main else ():
            try:
                self._callbacks[name].on_run_end(self._state(error=error))
            except Exception as failure:  # a user's code: the first error is the one to report
                self._monitor.warn(self._job.stage, f"{_failed(name, 'on_run_end', failure)}.")

    def states(self) -> dict[str, Any]:
        """Return the callbacks' states for a checkpoint. Raises RunError for one that is not JSON."""
        states = {}
        for name, callback in self._callbacks.items():
            with _failure_of(name, "state_dict"):
                states[name] = json.loads(json.dumps(callback.state_dict(), allow_nan=False))
        return {name: state for name, state in states.items() if state}

    def _call(self, hook: str) -> str | None:
        """Call a hook in this process; return the callback that asked to stop."""
        stopped_by: list[str] = []
        model = self._job.model
        was_training = model.training
        for name in self._names[hook]:
            with _failure_of(name, hook):
                getattr(self._callbacks[name], hook)(self._state(stop=partial(_append, stopped_by, name)))
        model.train(was_training)
        return stopped_by[0] if stopped_by else None

    def _state(self, **more: Any) -> CallbackState:
        job, progress, steps = self._job, self._progress, num_steps_of(self._job)
        return CallbackState(
            stage=job.stage,
            job=job.name,
            seed=job.seed,
            folder=job.job_dir.path,
            run_dir=self._monitor.run_dir or job.job_dir.path,
            model=job.model,
            config=self._config,
            epoch=progress.epoch,
            num_epochs=job.config.epochs,
            global_step=progress.epoch * steps + progress.step,
            steps_per_epoch=steps,
            history=tuple(progress.history),
            mean_losses=lambda: {name: float(total) / progress.step for name, total in progress.sums.items()},
            warn=partial(self._monitor.warn, job.stage),
            **more,
        )


@contextmanager
def callbacks_of(job: TrainJob, progress: Progress, monitor: RunMonitor) -> Iterator[Hooks]:
    """Start the callbacks of a training at its position, yield them, and end them, also after an error."""
    hooks = Hooks(job, progress, monitor)
    try:
        hooks.start()
        yield hooks
    except BaseException as error:
        hooks.interrupt(error)
        raise
    hooks.call("on_run_end")


def _append(names: list[str], name: str) -> None:
    names.append(name)


def _overrides(callback: Callback, hook: str) -> bool:
    """Return whether a callback has its own method, so that an unused hook costs nothing."""
    return getattr(type(callback), hook) is not getattr(Callback, hook)


@contextmanager
def _failure_of(name: str, hook: str) -> Iterator[None]:
    """Raise RunError for an error in a callback."""
    try:
        yield
    except Exception as error:  # a user's code
        raise RunError(
            f"{_failed(name, hook, error)}: correct it, or remove it from callbacks; the same command continues from "
            "the last checkpoint."
        ) from error


def _failed(name: str, hook: str, error: Exception) -> str:
    return f"the callback {name} failed in {hook} ({cause(error)})"
