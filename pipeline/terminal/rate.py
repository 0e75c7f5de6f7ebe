"""Estimate the rate and the remaining time of jobs, and format them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from kdpipe.pipeline.terminal.reporter import is_last
from kdpipe.stages.runtime.events import ProgressEvent

SMOOTHING_S = 30.0
"""Time constant of the exponential average of the rate."""

MIN_STEPS_REMEMBERED = 4.0
"""The average covers at least this many steps, however long one takes."""


@dataclass
class Rate:
    """Rate of a job, as an exponential average over the steps made by this process.

    Steps done before a resume do not count.
    """

    first: int
    step: int
    total: int
    started_at: float
    updated_at: float
    _steps: float = 0.0
    _seconds: float = 0.0

    @classmethod
    def start(cls, step: int, total: int, now: float) -> Rate:
        return cls(step, step, total, started_at=now, updated_at=now)

    def update(self, step: int, total: int, now: float) -> None:
        """Record that the job is at `step` of `total`, at `now` seconds of a monotonic clock."""
        if step < self.step:  # a new round under the same name
            self._steps = self._seconds = 0.0
        elif step > self.step:
            elapsed_s = now - self.updated_at
            decay = math.exp(-elapsed_s / max(SMOOTHING_S, MIN_STEPS_REMEMBERED * elapsed_s))
            self._steps = self._steps * decay + step - self.step
            self._seconds = self._seconds * decay + elapsed_s
        if step != self.step:
            self.updated_at = now
        self.step, self.total = step, total

    @property
    def elapsed_s(self) -> float:
        return self.updated_at - self.started_at

    def per_s(self) -> float | None:
        """Return steps per second; None before this process has made two."""
        return self._steps / self._seconds if self._seconds > 0 and self._steps > 0 else None

    def eta_s(self, now: float) -> float | None:
        """Return the remaining seconds, 0 once overdue; None while the rate is unknown."""
        rate = self.per_s()
        return None if rate is None else max(0.0, (self.total - self.step) / rate - (now - self.updated_at))


class RateTracker:
    """The rates of all jobs, by stage and name."""

    def __init__(self) -> None:
        self._rates: dict[tuple[str, str], Rate] = {}

    def update(self, event: ProgressEvent) -> Rate:
        """Return the rate of the event's job, this event included."""
        now, key = time.monotonic(), (event.stage, event.job)
        rate = self._rates.get(key)
        if rate is None:
            rate = self._rates[key] = Rate.start(event.step, event.total, now)
        else:
            rate.update(event.step, event.total, now)
        if is_last(event):
            del self._rates[key]
        return rate


def rate_text(rate_per_s: float | None, unit: str) -> str:
    """Return a rate such as "1,234 images/s" or "3.1 units/min"; empty if it is unknown."""
    if rate_per_s is None or not math.isfinite(rate_per_s) or rate_per_s <= 0:
        return ""
    for factor, name in ((1, "s"), (60, "min"), (3600, "h")):
        rate = rate_per_s * factor
        if rate >= 1 or name == "h":
            break
    return f"{rate:,.0f} {unit}s/{name}" if rate >= 9.95 else f"{rate:.1f} {unit}s/{name}"


def count_text(count: int, unit: str) -> str:
    """Return a count such as "3,000 steps" or "1 store"."""
    return f"{count:,} {unit}{'' if count == 1 else 's'}"


def duration_text(seconds: float) -> str:
    """Return a duration such as "34 s", "12 min", "2 h 05 min" or "3 d 4 h"."""
    if not math.isfinite(seconds):
        return "forever"
    whole = max(0, round(seconds))
    if whole < 100:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24:,} d {hours % 24} h"
