"""Progress reporting and cooperative stopping.

Stages do not depend on terminals and signals: `pipeline` shows the events and sets the stop flag.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdpipe.stages.errors import StoppedEarly
from kdpipe.stages.runtime.callbacks import Callback
from kdpipe.store.redact import redacted

WARNING = "warning"
"""The unit of an event that is a warning; its `job` is the text."""


@dataclass(frozen=True)
class ProgressEvent:
    """Progress of a stage: `step` of `total` `unit`s of `job` are done; `metrics` are figures by name.

    URLs in `job` lose their passwords and queries.
    """

    stage: str
    job: str
    step: int
    total: int
    unit: str
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "job", redacted(self.job))


def _ignore(event: ProgressEvent) -> None:
    pass


def _never() -> bool:
    return False


@dataclass(frozen=True)
class RunMonitor:
    """A reporter, a stop flag, and the callbacks of all trainings.

    Attributes:
        config: The resolved recipe, for callbacks.
        run_dir: The run folder, for callbacks; by default that of the training itself.
        said: The warnings that are not repeated.
    """

    report: Callable[[ProgressEvent], None] = _ignore  # named, so that it can be pickled
    should_stop: Callable[[], bool] = _never
    callbacks: tuple[Callback, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    run_dir: Path | None = None
    said: set[str] = field(default_factory=set, repr=False, compare=False)

    def check(self) -> None:
        """Raise StoppedEarly if the stop flag is set. Call it only where everything done so far is saved."""
        if self.should_stop():
            raise StoppedEarly

    def warn(self, stage: str, message: str) -> None:
        """Report a warning."""
        self.report(ProgressEvent(stage, message, 1, 1, WARNING))

    def warn_once(self, stage: str, message: str) -> None:
        """Report a warning, unless it was reported before."""
        if message not in self.said:
            self.said.add(message)
            self.warn(stage, message)

    def counter(self, stage: str, job: str, unit: str) -> Callable[[int, int], None]:
        """Return a callback for loops: given (done, total) after each `unit`, it reports and checks the stop flag."""

        def count(done: int, total: int) -> None:
            self.report(ProgressEvent(stage, job, done, total, unit))
            self.check()

        return count
