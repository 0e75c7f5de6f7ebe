"""Show progress on stderr: bars on a terminal, a plain line every 10 s in a log, JSON lines with --json.

Progress never ends a job: a closed terminal or a broken pipe is ignored.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kdpipe.pipeline.terminal.output import Verbosity, console, printable, verbosity
from kdpipe.pipeline.terminal.rate import Rate, RateTracker, count_text, duration_text, rate_text
from kdpipe.pipeline.terminal.reporter import Reporter, Throttle, is_last, json_text, utc_now
from kdpipe.pipeline.terminal.whole_run import WholeRun
from kdpipe.stages.evaluation.main_metric import metric_of
from kdpipe.stages.runtime.events import WARNING, ProgressEvent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 10.0
MAX_LOSSES = 3
"""The losses that are named; the rest is "..."."""

WIDE = 120
"""Columns from which a bar shows accuracy and loss too, which would cut other numbers; finished jobs print them."""

MAX_BARS = 4
"""With more jobs at once, the one that reported longest ago is printed as a line instead."""


@contextmanager
def reporter(as_json: bool, whole: WholeRun | None = None) -> Iterator[Reporter]:
    """Yield the reporter that suits stderr and the verbosity; it shows the progress of a `whole` run too."""
    if as_json:
        yield _line_reporter(json_event, whole)
    elif verbosity() == Verbosity.QUIET or not _is_interactive():
        yield _line_reporter(plain_line, whole)
    else:
        with _bar_reporter(whole) as report:
            yield report


def _is_interactive() -> bool:
    """Return whether stderr is a terminal that can redraw lines."""
    try:
        return sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in {"dumb", "unknown"}
    except (AttributeError, ValueError):  # stderr is missing or closed
        return False


def _line_reporter(text: Callable[[ProgressEvent, Rate, WholeRun | None], str], whole: WholeRun | None) -> Reporter:
    throttle, rates = Throttle(LINE_EVERY_S), RateTracker()

    def report(event: ProgressEvent) -> None:
        if whole is not None:
            whole.update(event)
        if event.unit != WARNING and verbosity() == Verbosity.QUIET:
            return
        rate = Rate.start(1, 1, time.monotonic()) if event.unit == WARNING else rates.update(event)
        if sys.stderr is not None and throttle.allow(event):  # without stderr, print would write to stdout
            with suppress(OSError, ValueError):
                print(printable(text(event, rate, whole)), file=sys.stderr, flush=True)  # noqa: T201

    return report


def plain_line(event: ProgressEvent, rate: Rate, whole: WholeRun | None = None) -> str:
    """Return a line such as "train-student: student distilled, seed 0: step 120/3000 (4 %), 85 steps/s, 34 s left".

    That of a whole run ends with "(stage 3 of 4, seed 1 of 5, about 12 min left for all)".
    """
    if event.unit == WARNING:
        return f"kdpipe: warning: {event.job}"
    percent = 100 * event.step // max(1, event.total)
    position = f"{event.stage}: {event.job}: {event.unit} {event.step}/{event.total} ({percent} %)"
    line = ", ".join([position, *_speed(event, rate), *_metrics(event)])
    return f"{line} ({', '.join(filter(None, [whole.position(), whole.time_left()]))})" if whole else line


def json_event(event: ProgressEvent, rate: Rate, whole: WholeRun | None = None) -> str:
    """Return the event as one line of JSON, with the time, the rate and the remaining time, also of a whole run."""
    per_s, left_s = rate.per_s(), rate.eta_s(rate.updated_at)
    timing: dict[str, Any] = {
        "rate_per_s": None if per_s is None else float(f"{per_s:.6g}"),
        "eta_s": None if left_s is None else round(left_s, 1),
    }
    if whole is not None:
        left_s = whole.left_s()
        timing |= {"run_position": whole.position(), "run_eta_s": None if left_s is None else round(left_s, 1)}
    return json_text({"time": utc_now(), **asdict(event), **timing})


def _done_line(event: ProgressEvent, rate: Rate) -> str:
    """Return a line such as "student distilled, seed 0: 3,000 steps in 35 s, test accuracy 98.12 %"."""
    took = count_text(event.total, event.unit)
    if rate.elapsed_s:
        took += f", the last {event.step - rate.first:,}" if rate.first > 1 else ""
        took += f" in {duration_text(rate.elapsed_s)}"
    return ", ".join([f"{event.job}: {took}", *_metrics(event)])


def _speed(event: ProgressEvent, rate: Rate) -> list[str]:
    text = rate_text(rate.per_s(), event.unit)
    if is_last(event):
        return [f"in {duration_text(rate.elapsed_s)} at {text}"] if text else []
    left_s = rate.eta_s(time.monotonic())
    return [text, f"{duration_text(left_s)} left"] if text and left_s is not None else []


def _metrics(event: ProgressEvent) -> list[str]:
    """Return the main metric of an epoch and its loss, with what that is the sum of; they come with its last step."""
    metric, losses = metric_of(event.metrics), event.metrics.get("losses")
    value, split = event.metrics.get(metric.name), event.metrics.get("split", "test")
    shown = [f"{split} {metric.title} {100 * value:.2f} %"] if isinstance(value, int | float) else []
    if isinstance(losses, dict) and losses and all(isinstance(loss, int | float) for loss in losses.values()):
        names = " + ".join([*list(losses)[:MAX_LOSSES], *["..."] * (len(losses) > MAX_LOSSES)])
        shown.append(f"loss {sum(losses.values()):.4g} ({names})")
    return shown


class Bars:
    """A rich progress bar for each running job, below that of the whole run; a finished job becomes a printed line."""

    def __init__(self, console: Console, whole: WholeRun | None = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        def text(field: str, style: str, **column: Any) -> TextColumn:
            fitted = Column(no_wrap=True, overflow="ellipsis", **column)
            return TextColumn(f"{{task.{field}}}", style=style, markup=False, table_column=fitted)

        self.progress: Progress = Progress(
            text("description", "none", max_width=40),
            BarColumn(None, table_column=Column(ratio=1, min_width=4, max_width=40)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            text("fields[speed]", "green"),
            text("fields[metrics]", "dim"),
            console=console,
            expand=True,
            transient=True,
            refresh_per_second=5,
        )
        self._rates, self._whole = RateTracker(), whole
        self._all: TaskID | None = None
        if whole is not None:
            self._all = self.progress.add_task(whole.position(), total=len(whole.jobs), speed="", metrics="")
        self._jobs: dict[tuple[str, str], tuple[TaskID, ProgressEvent, Rate]] = {}

    def report(self, event: ProgressEvent) -> None:
        """Draw, print or finish the job of the event."""
        self._follow(event)
        if event.unit == WARNING:
            self._print(plain_line(event, Rate.start(1, 1, time.monotonic())))
            return
        rate, key = self._rates.update(event), (event.stage, event.job)
        known = self._jobs.pop(key, None)
        if is_last(event):
            if known:
                self.progress.remove_task(known[0])
            self._print(_done_line(event, rate))
            return
        task = known[0] if known else self.progress.add_task(printable(event.job), speed="", metrics="")
        self.progress.update(task, completed=event.step, total=event.total, speed=", ".join(_speed(event, rate)))
        if event.metrics and self.progress.console.width >= WIDE:
            self.progress.update(task, metrics=", ".join(_metrics(event)))
        self._jobs[key] = (task, event, rate)
        if len(self._jobs) > MAX_BARS:
            self._settle(next(iter(self._jobs)))

    def _follow(self, event: ProgressEvent) -> None:
        """Move the bar of the whole run."""
        if self._whole is not None and self._all is not None:
            self._whole.update(event)
            position, left = self._whole.position(), self._whole.time_left()
            self.progress.update(self._all, description=position, completed=self._whole.num_done, speed=left)

    def settle_all(self) -> None:
        """Print all running jobs as lines, and remove their bars."""
        for key in list(self._jobs):
            self._settle(key)

    def _settle(self, key: tuple[str, str]) -> None:
        task, event, rate = self._jobs.pop(key)
        self.progress.remove_task(task)
        self._print(plain_line(event, rate))

    def _print(self, line: str) -> None:
        self.progress.console.print(printable(line), markup=False, highlight=False)


@contextmanager
def _bar_reporter(whole: WholeRun | None) -> Iterator[Reporter]:
    bars = Bars(console(sys.stderr), whole)

    def report(event: ProgressEvent) -> None:
        with suppress(OSError, ValueError):
            bars.report(event)

    with suppress(OSError, ValueError):
        bars.progress.start()
    try:
        yield report
    finally:
        with suppress(OSError, ValueError):
            bars.progress.stop()
            bars.settle_all()
