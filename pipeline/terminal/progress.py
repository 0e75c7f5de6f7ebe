"""How a job is seen: a bar on a terminal, a plain line every so often in a log, JSON lines for a machine. To stderr.

What is seen never ends a job: a terminal that is gone, or a pipe that nobody reads, is no reason to stop.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from pipeline.session.event_log import Reporter, Spacing, is_last, json_text, utc_now
from pipeline.terminal.output import printable
from pipeline.terminal.rate import Pace, duration_text, rate_text
from stages.watch import WARNING, Event

__all__ = ["LINE_EVERY_S", "Reporter", "reporter"]

LINE_EVERY_S = 10.0


@contextmanager
def reporter(as_json: bool) -> Iterator[Reporter]:
    """A reporter that suits where stderr goes."""
    if as_json:
        yield _lines(json_event)
    elif _draws_bars():
        from pipeline.terminal.bars import bars

        with bars() as draw:
            yield draw
    else:
        yield _lines(plain_line)


def _draws_bars() -> bool:
    """Whether stderr is a terminal on which a line can be drawn anew."""
    try:
        return sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in {"dumb", "unknown"}
    except (AttributeError, ValueError):  # there is no stderr, or it is closed
        return False


class Paces:
    """The pace of each job, by its stage and name."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, str], Pace] = {}

    def after(self, event: Event) -> Pace:
        """The pace of the event's job, this event included."""
        now, key = time.monotonic(), (event.stage, event.job)
        pace = self._of.get(key)
        if pace is None:
            pace = self._of[key] = Pace.start(event.step, event.total, now)
        else:
            pace.went_to(event.step, event.total, now)
        if is_last(event):
            del self._of[key]
        return pace


def _lines(text: Callable[[Event, Pace], str]) -> Reporter:
    """Write what `text` makes of some of the events, a line each."""
    spacing, paces = Spacing(LINE_EVERY_S), Paces()

    def report(event: Event) -> None:
        pace = Pace.start(1, 1, time.monotonic()) if event.unit == WARNING else paces.after(event)
        if sys.stderr is not None and spacing.lets_through(event):  # print would take stdout for it
            with suppress(OSError, ValueError):
                print(printable(text(event, pace)), file=sys.stderr, flush=True)  # noqa: T201

    return report


def plain_line(event: Event, pace: Pace) -> str:
    """As in: train-student: distilled student, seed 0: step 120/3000 (4 %), 85 steps/s, 34 s left."""
    if event.unit == WARNING:
        return f"kdpipe: warning: {event.job}"
    percent = 100 * event.step // max(1, event.total)
    where = f"{event.stage}: {event.job}: {event.unit} {event.step}/{event.total} ({percent} %)"
    return ", ".join([where, *_how_fast(event, pace), *figures(event)])


def json_event(event: Event, pace: Pace) -> str:
    """The event as one line of JSON, with its moment, and with rate and time left where these are known."""
    rate, left = pace.rate_per_s(), pace.eta_s(pace.seen)
    known: dict[str, Any] = {
        "rate_per_s": None if rate is None else float(f"{rate:.6g}"),
        "eta_s": None if left is None else round(left, 1),
    }
    return json_text({"time": utc_now(), **asdict(event), **known})


def figures(event: Event) -> list[str]:
    """The figures of an epoch, for people: they come with its last step."""
    metrics = event.metrics
    accuracy, losses = metrics.get("accuracy"), metrics.get("losses")
    told = [f"test accuracy {100 * accuracy:.2f} %"] if isinstance(accuracy, int | float) else []
    if isinstance(losses, dict) and losses and all(isinstance(loss, int | float) for loss in losses.values()):
        told.append(f"loss {sum(losses.values()):.4g}")
    return told


def _how_fast(event: Event, pace: Pace) -> list[str]:
    rate = rate_text(pace.rate_per_s(), event.unit)
    if is_last(event):
        return [f"in {duration_text(pace.seen - pace.began)} at {rate}"] if rate else []
    left = pace.eta_s(time.monotonic())
    return [rate, f"{duration_text(left)} left"] if rate and left is not None else []
