"""How fast a job goes, and how long it still takes: of what this process did, and in words for people."""

from __future__ import annotations

import math
from dataclasses import dataclass

SMOOTHING_S = 30.0
"""What happened so long ago counts 1/e of what happens now."""

LEAST_REMEMBERED = 4.0
"""Where a step takes long, so many steps are remembered whatever they took."""


@dataclass
class Pace:
    """A job's pace, from the steps that this process saw it make: what a resumed job found done is no merit of its own.

    The rate is steps over seconds, both weighted by how long ago they were.
    """

    first: int
    step: int
    total: int
    began: float
    seen: float
    _steps: float = 0.0
    _seconds: float = 0.0

    @classmethod
    def start(cls, step: int, total: int, now: float) -> Pace:
        return cls(step, step, total, began=now, seen=now)

    def went_to(self, step: int, total: int, now: float) -> None:
        """The job is at `step` of `total`, at `now` seconds of a clock that never goes back."""
        if step < self.step:  # a new round under the same name
            self._steps = self._seconds = 0.0
        elif step > self.step and now > self.seen:
            passed_s = now - self.seen
            kept = math.exp(-passed_s / max(SMOOTHING_S, LEAST_REMEMBERED * passed_s))
            self._steps = self._steps * kept + step - self.step
            self._seconds = self._seconds * kept + passed_s
        elif step > self.step:
            self._steps += step - self.step
        if step != self.step:
            self.seen = now
        self.step, self.total = step, total

    def rate_per_s(self) -> float | None:
        """Steps a second; None before this process has made two."""
        return self._steps / self._seconds if self._seconds > 0 and self._steps > 0 else None

    def eta_s(self, now: float) -> float | None:
        """Seconds that are left; None where the rate is not known. 0 once it is overdue."""
        rate = self.rate_per_s()
        return None if rate is None else max(0.0, (self.total - self.step) / rate - (now - self.seen))


def rate_text(rate_per_s: float | None, unit: str) -> str:
    """As in 1,234 images/s, 2.5 steps/s, 3.1 units/min; empty where it is not known."""
    if rate_per_s is None or not math.isfinite(rate_per_s) or rate_per_s <= 0:
        return ""
    for per, name in ((1, "s"), (60, "min"), (3600, "h")):
        rate = rate_per_s * per
        if rate >= 1 or name == "h":
            break
    return f"{rate:,.0f} {unit}s/{name}" if rate >= 9.95 else f"{rate:.1f} {unit}s/{name}"


def count_text(count: int, unit: str) -> str:
    """As in 3,000 steps, 1 store."""
    return f"{count:,} {unit}{'' if count == 1 else 's'}"


def duration_text(seconds: float) -> str:
    """As in 34 s, 12 min, 2 h 05 min, 3 d 4 h."""
    if not math.isfinite(seconds):
        return "for ever"
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
