"""What the page's diagrams are drawn with: frames, scales, ticks and lines, as SVG text without scripts or styles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.page.markup import Html, join, safe
from pipeline.report.pareto import Axis, nice_step

SMALL = 11
"""Height of a tick's text in user units; a panel is about 320 of them wide, and about as many pixels on a phone."""

ROUND_ACCURACIES = (50, 90, 99, 99.9, 99.99, 0, 80, 95, 98, 99.5, 70, 60, 40, 20, 30, 10, 85, 97, 99.8, 99.95)
"""Where ticks look well on an axis of accuracies in percent, the best first."""


@dataclass(frozen=True)
class Frame:
    """A panel's size, and the rectangle in it that holds the data, in user units."""

    width: float
    height: float
    left: float
    top: float
    right: float
    bottom: float


def svg(frame: Frame, title: str, desc: str, parts: Iterable[object], kind: str = "") -> Html:
    """A picture with its name and a description, for those who cannot see it."""
    size = f"0 0 {frame.width:g} {frame.height:g}"
    head = f'<svg class="{f"chart {kind}".strip()}" viewBox="{size}" role="img">'
    return join([Html(head), Html(f"<title>{safe(title)}</title><desc>{safe(desc)}</desc>"), *parts, Html("</svg>")])


def words(x: float, y: float, text: object, *, anchor: str = "start", kind: str = "", size: float = SMALL) -> Html:
    """A text with its baseline at (x, y)."""
    given = f' class="{kind}"' if kind else ""
    return Html(f'<text{given} x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}">{safe(text)}</text>')


def stroke(kind: str, points: Iterable[tuple[float, float]]) -> Html:
    """A line through points."""
    return Html(f'<path class="{kind}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>')


@dataclass(frozen=True)
class ErrorAxis:
    """Accuracies in percent, placed by the logarithm of the error that they leave: 98 is to 99 as 90 to 95, so that
    what sets good networks apart is seen. Nothing stands above `highest`, which is below 100.
    """

    lowest: float
    highest: float
    bottom: float
    top: float

    def place(self, accuracy: float) -> float:
        inside = min(max(accuracy, self.lowest), self.highest)
        return Axis(100 - self.lowest, 100 - self.highest, self.bottom, self.top, log=True).place(100 - inside)

    def ticks(self, apart: float = 19) -> list[float]:
        """Round accuracies, lowest first, no two closer than `apart`."""
        step = nice_step((self.highest - self.lowest) / 4)
        evenly = [step * at for at in range(math.ceil(self.lowest / step), math.floor(self.highest / step) + 1)]
        chosen: list[float] = []
        for one in (*ROUND_ACCURACIES, *evenly):
            inside = self.lowest <= one <= self.highest
            if inside and all(abs(self.place(one) - self.place(other)) >= apart for other in chosen):
                chosen.append(one)
        return sorted(chosen)


def error_axis(accuracies: Sequence[float], bottom: float, top: float) -> ErrorAxis:
    """An axis that has room for all of them."""
    errors = [100 - one for one in accuracies]
    positive = [one for one in errors if one > 0]
    least = min(positive, default=1.0)
    if len(positive) < len(errors):
        least /= 2  # without any error there is no logarithm
    room = max((max([*errors, least]) / least) ** 0.06, 1.01)
    return ErrorAxis(100 - min(100.0, max([*errors, least]) * room), 100 - least / room, bottom, top)


def epoch_axis(frame: Frame, num_epochs: int) -> Axis:
    return Axis(1, max(2, num_epochs), frame.left, frame.right, log=False)


def epoch_ticks(frame: Frame, x: Axis) -> list[Html]:
    """Round epochs below the frame, and what they are."""
    step = max(1, int(nice_step((x.high - x.low) / 4)))
    numbers = [at for at in range(0, int(x.high) + 1, step) if at >= 1] if step > 1 else range(1, int(x.high) + 1)
    ticks = [words(x.place(at), frame.bottom + 15, at, anchor="middle", kind="tick") for at in numbers]
    middle = (frame.left + frame.right) / 2
    return [*ticks, words(middle, frame.bottom + 30, "epoch", anchor="middle", kind="tick")]


def level_line(frame: Frame, y: float, label: object) -> Html:
    """A line of the grid, with its label to the left."""
    line = Html(f'<path class="grid" d="M{frame.left:g} {y:.1f}H{frame.right:g}"/>')
    return join([line, words(frame.left - 6, y + 4, label, anchor="end", kind="tick")])


def spread(places: Sequence[float], apart: float, end: float) -> list[float]:
    """The same places, moved so that labels there are `apart`, and none lies beyond `end`."""
    order = sorted(range(len(places)), key=lambda at: places[at])
    moved = list(places)
    for before, at in pairwise(order):
        moved[at] = max(moved[at], moved[before] + apart)
    for left, at in enumerate(reversed(order)):
        moved[at] = min(moved[at], end - left * apart)
    return moved
