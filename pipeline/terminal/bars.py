"""Progress on a terminal: one line a job that is under way, drawn anew; a finished one leaves as a printed line."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pipeline.session.event_log import Reporter, is_last
from pipeline.terminal.output import printable
from pipeline.terminal.progress import Paces, figures, plain_line
from pipeline.terminal.rate import Pace, count_text, duration_text, rate_text
from stages.watch import WARNING, Event

MOST_LIVE = 4
"""So many jobs are drawn; of more, the one that was heard of least lately is printed as it stands."""

REFRESH_PER_S = 5
MOST_NAME = 26
"""So many cells of a name are kept before figures are."""

LEAST_BAR, MOST_BAR = 6, 40
GAP = "  "


@dataclass
class JobDrawn:
    """A job under way: its last event, its pace, and the figures of its last epoch."""

    event: Event
    pace: Pace
    figures: Sequence[str] = ()


class Bars:
    """The jobs under way; rich asks for their lines several times a second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._paces = Paces()
        self._jobs: dict[tuple[str, str], JobDrawn] = {}

    def report(self, event: Event) -> None:
        if event.unit == WARNING:
            self._say(plain_line(event, Pace.start(1, 1, time.monotonic())))
            return
        pace, key = self._paces.after(event), (event.stage, event.job)
        before = self._jobs.pop(key, None)
        if is_last(event):
            self._say(done_line(event, pace))
            return
        self._jobs[key] = JobDrawn(event, pace, figures(event) or (before.figures if before else ()))
        if len(self._jobs) > MOST_LIVE:
            self.settle(next(iter(self._jobs)))

    def settle(self, key: tuple[str, str]) -> None:
        """Print a job as it stands, and draw it no more until it is heard of again."""
        job = self._jobs.pop(key)
        self._say(plain_line(job.event, job.pace))

    def settle_all(self) -> None:
        for key in list(self._jobs):
            self.settle(key)

    def draw(self) -> Group:
        """The lines, for the terminal as wide as it is now."""
        now, width = time.monotonic(), self._console.width
        plain = not self._console.encoding.startswith("utf")
        return Group(*[bar_line(job, now, width, plain=plain) for job in list(self._jobs.values())])

    def _say(self, line: str) -> None:
        self._console.print(printable(line), markup=False, highlight=False)


def done_line(event: Event, pace: Pace) -> str:
    """As in: distilled student, seed 0: 3,000 steps in 35 s, test accuracy 98.12 %. Short, for a narrow terminal."""
    own_s, took = pace.seen - pace.began, count_text(event.total, event.unit)
    if own_s:
        took += f", the last {event.step - pace.first:,}" if pace.first > 1 else ""
        took += f" in {duration_text(own_s)}"
    return ", ".join([f"{event.job}: {took}", *figures(event)])


def bar_line(job: JobDrawn, now: float, width: int, *, plain: bool = False) -> Text:
    """One job in at most `width` cells: name, bar, steps, rate, time left, figures. What has no room is left out, the
    least important first, and the name is cut last. plain: without signs beyond ASCII.
    """
    event, pace = job.event, job.pace
    of = f"{event.total:,}"
    count = f"{event.step:>{len(of)},}/{of} {event.unit}s"
    left = pace.eta_s(now)
    names = (printable(f"{event.stage}: {event.job}"), printable(event.job))
    pieces = {  # in the order of their places
        "count": count,
        "rate": f"{rate_text(pace.rate_per_s(), event.unit):>11}",
        "left": f"{duration_text(left):>4} left" if left is not None else " " * 9,
        "elapsed": f"in {duration_text(now - pace.began)}",
        **{f"figure{number}": figure.removeprefix("test ") for number, figure in enumerate(job.figures)},
    }
    for least in ("elapsed", "figure1", "figure0", "rate", "left", "count"):
        if min(MOST_NAME, cell_len(names[1])) + len(GAP) + LEAST_BAR + _cells(pieces) < width:
            break
        pieces.pop(least, None)
    room = max(0, width - 1 - _cells(pieces) - LEAST_BAR - len(GAP))
    name = next((one for one in names if cell_len(one) <= room), _cut(names[1], room, plain))
    bar_cells = max(0, min(MOST_BAR, width - 1 - cell_len(name) - len(GAP) - _cells(pieces)))
    line = Text(name + GAP, no_wrap=True, overflow="crop")
    done, still = _bar(event, bar_cells, plain)
    line.append(done, style="cyan").append(still, style="bright_black")
    for kind, piece in pieces.items():
        line.append(GAP).append(piece, style={"count": "", "left": "green"}.get(kind, "dim"))
    line.truncate(max(1, width - 1))
    return line


def _cells(pieces: dict[str, str]) -> int:
    return sum(len(GAP) + cell_len(piece) for piece in pieces.values())


def _cut(name: str, cells: int, plain: bool) -> str:
    """The end of a name, which tells one job from another."""
    mark = "..." if plain else "…"
    kept = max(0, cells - len(mark))
    return (mark + set_cell_size(name[::-1], kept)[::-1])[: max(0, cells)]


def _bar(event: Event, cells: int, plain: bool) -> tuple[str, str]:
    filled = min(cells, max(0, cells * event.step // max(1, event.total)))
    signs = ("#", "-") if plain else ("━", "━")
    return signs[0] * filled, signs[1] * (cells - filled)


@contextmanager
def bars() -> Iterator[Reporter]:
    """A reporter that draws on stderr, a terminal."""
    console = Console(stderr=True)
    drawn = Bars(console)
    live = Live(console=console, get_renderable=drawn.draw, refresh_per_second=REFRESH_PER_S, transient=True)

    def report(event: Event) -> None:
        with suppress(OSError, ValueError):  # the terminal is gone: that is no reason for a job to end
            drawn.report(event)

    with suppress(OSError, ValueError):
        live.start()
    try:
        yield report
    finally:
        with suppress(OSError, ValueError):
            live.stop()
            drawn.settle_all()
