"""What a stage is handed to be seen and stopped by: a reporter for events, and a flag that says to stop.

Stages know nothing of terminals and signals: `pipeline` draws the events and sets the flag.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.errors import StoppedEarly

WARNING = "warning"
"""The unit of an event that is a sentence for people: its `job`."""


@dataclass(frozen=True)
class Event:
    """Where a stage is: `step` of `total` `unit`s of `job` are done. `metrics` carries figures by name."""

    stage: str
    job: str
    step: int
    total: int
    unit: str
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Watch:
    """A reporter and a stop flag."""

    report: Callable[[Event], None] = lambda event: None
    should_stop: Callable[[], bool] = lambda: False

    def check(self) -> None:
        """Raise StoppedEarly if the stop flag is set. Call it only where everything done so far is saved."""
        if self.should_stop():
            raise StoppedEarly

    def warn(self, stage: str, sentence: str) -> None:
        """Tell people something that is no error and that they should know."""
        self.report(Event(stage, sentence, 1, 1, WARNING))

    def counter(self, stage: str, job: str, unit: str) -> Callable[[int, int], None]:
        """What a loop calls with (done, total) after each `unit`, to be seen and stopped."""

        def count(done: int, total: int) -> None:
            self.report(Event(stage, job, done, total, unit))
            self.check()

        return count
