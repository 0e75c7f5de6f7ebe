"""Base class of the built-in callbacks, which write the metrics of each epoch and never end a job."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from kdpipe.stages.errors import cause
from kdpipe.stages.evaluation.main_metric import METRICS
from kdpipe.stages.runtime.callbacks import Callback, CallbackState
from kdpipe.store.errors import KdpipeError

TAGS = {name: f"test/{name}" for name in (*METRICS, "cross_entropy")} | {"lr": "lr", "wall_s": "epoch_wall_s"}


class Unavailable(KdpipeError):
    """A package or an account that a tracker needs is missing; the text says what to do."""


class MetricsLogger(Callback):
    """A callback that writes the metrics of epochs. What fails is one warning, and the job goes on without it."""

    is_on = True

    def on_run_start(self, state: CallbackState) -> None:
        """Start to write a training's metrics."""
        self._attempt(self.start, state)

    def on_epoch_end(self, state: CallbackState) -> None:
        """Write an epoch's metrics."""
        self._attempt(self.log, state)

    def on_run_end(self, state: CallbackState) -> None:
        """Close what is open."""
        self._attempt(self.finish, state)

    def start(self, state: CallbackState) -> None:
        """Prepare for a training."""

    def log(self, state: CallbackState) -> None:
        """Write the metrics of the last epoch."""
        raise NotImplementedError

    def finish(self, state: CallbackState) -> None:
        """Close what is open."""

    def _attempt(self, work: Callable[[CallbackState], None], state: CallbackState) -> None:
        """Do some work; after a failure do no more."""
        if not self.is_on:
            return
        try:
            work(state)
        except Exception as error:  # other people's code, networks and disks
            self.is_on = False
            why = str(error) if isinstance(error, Unavailable) else f"{self.name} failed ({cause(error)})"
            state.warn(f"{why}. The job goes on without {self.name}; metrics.jsonl has the same figures.")


def scalars_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among the metrics of an epoch, by tag."""
    split = str(metrics.get("split", "test"))
    found = {tag.replace("test/", f"{split}/"): metrics.get(name) for name, tag in TAGS.items()}
    losses = metrics.get("losses")
    if isinstance(losses, Mapping):
        found |= {f"loss/{name}": loss for name, loss in losses.items()}
    return {tag: float(value) for tag, value in found.items() if isinstance(value, int | float)}


def folder_name(job: str) -> str:
    """Return a folder name for a job, such as student-distilled-seed-0."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", job).strip("-.")[:100] or "job"
