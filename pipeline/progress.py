"""How a job is seen: a bar on a terminal, a plain line every so often in a log, JSON lines for a machine. To stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from stages.watch import WARNING, Event

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_EVERY_S = 10.0

Reporter = Callable[[Event], None]


@contextmanager
def reporter(as_json: bool) -> Iterator[Reporter]:
    """A reporter that suits where stderr goes."""
    if as_json:
        yield _spaced(lambda event: _write(json.dumps(asdict(event))))
    elif sys.stderr.isatty():
        with _bars() as draw:
            yield draw
    else:
        yield _spaced(lambda event: _write(_line(event)))


def _spaced(write: Callable[[Event], None]) -> Reporter:
    """Let through a job's first event, its last, and in between one every LINE_EVERY_S seconds."""
    written: dict[str, float] = {}

    def report(event: Event) -> None:
        now = time.monotonic()
        last = written.get(event.job)
        ended = event.step == event.total and (event.metrics or event.unit != "step")
        if last is None or ended or now - last >= LINE_EVERY_S:
            written[event.job] = now
            write(event)

    return report


def _write(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def _line(event: Event) -> str:
    if event.unit == WARNING:
        return f"kdpipe: warning: {event.job}"
    percent = 100 * event.step // max(1, event.total)
    return f"{event.stage}: {event.job}: {event.unit} {event.step}/{event.total} ({percent} %){_figures(event)}"


def _figures(event: Event) -> str:
    accuracy = event.metrics.get("accuracy")
    return "" if accuracy is None else f", test accuracy {100 * accuracy:.2f} %"


@contextmanager
def _bars() -> Iterator[Reporter]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.fields[stage]}", style="dim"),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}s"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[figures]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def report(event: Event) -> None:
            if event.unit == WARNING:
                progress.console.print(_line(event), markup=False, highlight=False)
                return
            if event.job not in tasks:
                tasks[event.job] = progress.add_task(
                    event.job, total=event.total, stage=event.stage, unit=event.unit, figures=""
                )
            task = tasks[event.job]
            progress.update(task, completed=event.step, total=event.total)
            if event.metrics:
                progress.update(task, figures=_figures(event).lstrip(", "))

        yield report
