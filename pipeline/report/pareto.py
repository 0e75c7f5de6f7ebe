"""The Pareto picture: accuracy against file size and against latency, one SVG file for light and dark pages.

The file is text alone, without scripts and without anything from elsewhere; the same points give the same bytes. A
point is on the front if no other is at least as good in both figures and better in one. Its line is a step, since
between two networks there is none: what a budget buys is the last point before it.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

from pipeline.terminal.output import printable
from store.durable import write_atomically

FONT, SMALL = 15, 13
"""Heights of text in user units."""

LETTER = 0.58
"""How wide a letter is taken to be, as a share of its height: wider than most are in the usual sans serif fonts."""

PANEL_WIDTH, LEFT, RIGHT, TOP, BOTTOM = 370, 70, 30, 80, 90
ROW = FONT + 5
TICKS_APART = 46
WIDEST_NAME = 280
DOT = 5

CAPTION = "filled: no other is as accurate for as little; bars: one standard deviation over seeds"

STYLE = """
:root { --paper: #ffffff; --ink: #1f2328; --faint: #d0d7de; --quiet: #59636e; --front: #0a5fb4; --other: #8c6a00; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --faint: #30363d; --quiet: #9198a1; --front: #6cb6ff; --other: #d9b13c; }
}
text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); }
.tick { fill: var(--quiet); }
.grid { stroke: var(--faint); }
.step { stroke: var(--front); fill: none; stroke-width: 2; }
.bar { stroke: var(--quiet); fill: none; }
.lead { stroke: var(--quiet); fill: none; stroke-dasharray: 2 3; }
.on { fill: var(--front); }
.off { fill: var(--paper); stroke: var(--other); stroke-width: 2; }
""".strip()


@dataclass(frozen=True)
class Point:
    """One network: its accuracy in percent, with the deviation over seeds if there are several; its ONNX file's bytes;
    its latency in ms, if it was measured. Raises ValueError for a size or latency that no logarithm takes.
    """

    name: str
    accuracy_percent: float
    accuracy_std: float | None
    file_bytes: int
    latency_ms: float | None

    def __post_init__(self) -> None:
        costs = [self.file_bytes] if self.latency_ms is None else [self.file_bytes, self.latency_ms]
        accuracies = (self.accuracy_percent, self.accuracy_std or 0.0)
        if not all(math.isfinite(cost) and cost > 0 for cost in costs) or not all(map(math.isfinite, accuracies)):
            raise ValueError(f"{self} cannot be drawn: sizes and latencies are above 0, accuracies are numbers.")


@dataclass(frozen=True)
class Dot:
    """A point in one panel: what it costs there."""

    point: Point
    cost: float

    @property
    def accuracy(self) -> float:
        return self.point.accuracy_percent

    @property
    def low_high(self) -> tuple[float, float]:
        std = self.point.accuracy_std or 0.0
        return self.accuracy - std, self.accuracy + std


@dataclass(frozen=True)
class Axis:
    """From values to places in user units: `low` is drawn at `start`, `high` at `end`; `log` in decades."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def place(self, value: float) -> float:
        low, high, at = (math.log(one) if self.log else one for one in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


@dataclass
class Room:
    """A panel while it fills: what is where. Names never meet each other, and dots and lines only for want of room."""

    frame: Box
    names: list[Box] = field(default_factory=list)
    dots: list[Box] = field(default_factory=list)
    lines: list[Box] = field(default_factory=list)


def draw_pareto(points: Sequence[Point], path: Path, *, title: str) -> None:
    """Write the picture to `path`, in place of what is there. Raises OSError where it cannot be written."""
    write_atomically(path, pareto_svg(points, title=title).encode())


def pareto_svg(points: Sequence[Point], *, title: str) -> str:
    """The picture's text."""
    height = TOP + BOTTOM + max(320, ROW * 2 * len(points))  # each name meets two rows: one stays free
    width = 2 * (LEFT + PANEL_WIDTH + RIGHT)
    by_size = [Dot(point, point.file_bytes) for point in points]
    by_time = [Dot(point, point.latency_ms) for point in points if point.latency_ms is not None]
    accuracy = _accuracy_axis(by_size, TOP, height - BOTTOM)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{_safe(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="var(--paper)"/>',
        f'<text x="{width / 2:g}" y="30" font-size="18" font-weight="600" text-anchor="middle">'
        f"{_safe(_short(title, 800 * FONT / 18))}</text>",
        *_panel(by_size, accuracy, LEFT, "ONNX file, smaller is better", _bytes_text),
        *_panel(by_time, accuracy, 2 * LEFT + PANEL_WIDTH + RIGHT, "latency, lower is better", _ms_text),
        f'<text class="tick" x="{width / 2:g}" y="{height - 14}" font-size="{SMALL}" text-anchor="middle">'
        f"{CAPTION}</text>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def pareto_panels(points: Sequence[Point], *, title: str) -> list[str]:
    """The picture's panels as pictures of their own, for a page that has `STYLE`'s classes and colours: by size, and by
    latency where any is known. A narrow page has one below the other.
    """
    height = TOP + BOTTOM + max(280, ROW * 2 * len(points))
    by_size = [Dot(point, point.file_bytes) for point in points]
    by_time = [Dot(point, point.latency_ms) for point in points if point.latency_ms is not None]
    accuracy = _accuracy_axis(by_size, TOP - 40, height - BOTTOM)
    panels = [(by_size, "ONNX file, smaller is better", _bytes_text), (by_time, "latency, lower is better", _ms_text)]
    size = f"0 0 {LEFT + PANEL_WIDTH + RIGHT} {height - 30}"
    return [
        "\n".join(
            [
                f'<svg class="chart" viewBox="{size}" role="img"><title>{_safe(title)}: {label}</title>',
                f"<desc>{CAPTION}</desc>",
                *_panel(dots, accuracy, LEFT, label, unit),
                "</svg>",
            ]
        )
        for dots, label, unit in panels
        if dots
    ]


def front(dots: Sequence[Dot]) -> list[Dot]:
    """Those that no other beats, cheapest first. Of equal ones, all."""
    best = [
        dot
        for dot in dots
        if not any(
            other.cost <= dot.cost
            and other.accuracy >= dot.accuracy
            and (other.cost, other.accuracy) != (dot.cost, dot.accuracy)
            for other in dots
        )
    ]
    return sorted(best, key=lambda dot: (dot.cost, dot.accuracy, dot.point.name))


def _accuracy_axis(dots: Sequence[Dot], top: float, bottom: float) -> Axis:
    """From a little below the lowest bar to a little above the highest, and not above 100 % for that."""
    low = min((dot.low_high[0] for dot in dots), default=0.0)
    high = max((dot.low_high[1] for dot in dots), default=100.0)
    room = max(0.1 * (high - low), 0.25)
    return Axis(low - room, max(high, min(high + room, 100.0)) + 0.2 * room, bottom, top, log=False)


def _cost_axis(dots: Sequence[Dot], left: float, right: float) -> Axis:
    low, high = min(dot.cost for dot in dots), max(dot.cost for dot in dots)
    factor = max(1.3, (high / low) ** 0.1)
    return Axis(low / factor, high * factor, left, right, log=True)


def _panel(dots: Sequence[Dot], y: Axis, left: float, label: str, unit: Callable[[float], str]) -> Iterator[str]:
    right, middle = left + PANEL_WIDTH, left + PANEL_WIDTH / 2
    yield f'<text x="{left}" y="{y.end - 16:g}" font-size="{FONT}">test accuracy, %</text>'
    yield f'<text x="{middle:g}" y="{y.start + 48:g}" font-size="{FONT}" text-anchor="middle">{label}</text>'
    yield from _accuracy_ticks(y, left, right)
    if dots:
        yield from _contents(dots, _cost_axis(dots, left, right), y, unit)
    else:
        yield (
            f'<text class="tick" x="{middle:g}" y="{(y.start + y.end) / 2:g}" font-size="{FONT}" text-anchor="middle">'
            "not measured</text>"
        )


def _contents(dots: Sequence[Dot], x: Axis, y: Axis, unit: Callable[[float], str]) -> Iterator[str]:
    """Ticks, the front, bars and dots, and last the labels, which find their places among all that."""
    best = front(dots)
    room = Room(Box(x.start, y.end, x.end, y.start))
    for at, tick in _apart([(x.place(tick), tick) for tick in _cost_ticks(x.low, x.high)]):
        yield f'<path class="grid" d="M{at:.1f} {y.end:g}V{y.start:g}"/>'
        yield (
            f'<text class="tick" x="{at:.1f}" y="{y.start + 20:g}" font-size="{SMALL}" text-anchor="middle">'
            f"{unit(tick)}</text>"
        )
    yield _step(best, x, y, room)
    for dot in dots:
        yield from _dot(dot, x, y, room, is_best=dot in best)
    for dot in dots:
        yield from _label(dot, x, y, room)


def _accuracy_ticks(y: Axis, left: float, right: float) -> Iterator[str]:
    step = nice_step((y.high - y.low) / 6)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    for number in range(math.ceil(y.low / step), math.floor(min(y.high, 100.0) / step + 1e-9) + 1):
        at = y.place(number * step)
        yield f'<path class="grid" d="M{left:g} {at:.1f}H{right:g}"/>'
        yield (
            f'<text class="tick" x="{left - 8:g}" y="{at + 0.35 * SMALL:.1f}" font-size="{SMALL}" text-anchor="end">'
            f"{number * step:.{decimals}f}</text>"
        )


def nice_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, ... times a power of ten that is no less than `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _cost_ticks(low: float, high: float) -> list[float]:
    """About three to six round values in between: multiples of one number, or over a wider range parts of decades."""
    if high / low < 5:
        step = nice_step((high - low) / 6)
        return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    ticks: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        ticks = [one for power in decades for factor in factors if low <= (one := factor * 10.0**power) <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 6)]


def _apart(ticks: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places and values, those left out whose label would meet that of a larger one."""
    kept: list[tuple[float, float]] = []
    for at, tick in sorted(ticks, reverse=True):
        if not kept or kept[-1][0] - at >= TICKS_APART:
            kept.append((at, tick))
    return kept[::-1]


def _step(best: Sequence[Dot], x: Axis, y: Axis, room: Room) -> str:
    """The front's line: from each point along its accuracy to where the next one begins, the last to the edge."""
    text = f"M{x.place(best[0].cost):.1f} {y.place(best[0].accuracy):.1f}"
    ends = [*(x.place(dot.cost) for dot in best[1:]), x.end]
    for dot, end in zip(best, ends, strict=True):
        start, height = x.place(dot.cost), y.place(dot.accuracy)
        text += f"V{height:.1f}H{end:.1f}"
        room.lines.append(Box(start, height - 1, end, height + 1))
    for before, dot in pairwise(best):
        at = x.place(dot.cost)
        room.lines.append(Box(at - 1, y.place(dot.accuracy), at + 1, y.place(before.accuracy)))
    return f'<path class="step" d="{text}"/>'


def _dot(dot: Dot, x: Axis, y: Axis, room: Room, *, is_best: bool) -> Iterator[str]:
    at, height = x.place(dot.cost), y.place(dot.accuracy)
    if dot.point.accuracy_std:
        low, high = map(y.place, dot.low_high)
        yield (
            f'<path class="bar" d="M{at:.1f} {low:.1f}V{high:.1f}M{at - 4:.1f} {low:.1f}h8M{at - 4:.1f} {high:.1f}h8"/>'
        )
        room.lines.append(Box(at - 4, high, at + 4, low))
    room.dots.append(Box(at - DOT, height - DOT, at + DOT, height + DOT))
    kind = "on" if is_best else "off"
    circle = f'<circle class="{kind}" cx="{at:.1f}" cy="{height:.1f}" r="{DOT}">'
    yield f"{circle}<title>{_safe(dot.point.name)}</title></circle>"


def _label(dot: Dot, x: Axis, y: Axis, room: Room) -> Iterator[str]:
    """The name at the nearest free place: clear of all; else of names and dots; else of names, as one row always is."""
    name = _short(dot.point.name, WIDEST_NAME)
    at, height = x.place(dot.cost), y.place(dot.accuracy)
    places = _places(at, height, _width(name), room.frame)
    keep_clear_of = ([*room.names, *room.dots, *room.lines], [*room.names, *room.dots], room.names)
    free = (place for taken in keep_clear_of for place in places if not any(map(place.overlaps, taken)))
    box = next(free)
    room.names.append(box)
    middle = (box.left + box.right) / 2
    away = max(box.left - at, at - box.right, box.top - height, height - box.bottom)
    if away > ROW:
        end = box.bottom if box.bottom < height else box.top
        yield f'<path class="lead" d="M{at:.1f} {height:.1f}L{min(max(at, box.left), box.right):.1f} {end:.1f}"/>'
    yield (
        f'<text class="name" x="{middle:.1f}" y="{box.bottom - 5:.1f}" font-size="{FONT}" text-anchor="middle">'
        f"{_safe(name)}</text>"
    )


def _places(at: float, height: float, width: float, frame: Box) -> list[Box]:
    """Where a name of `width` may stand in the frame, nearest to the dot at (at, height) first, touching it last."""
    gap = DOT + 4
    beside = [(at + gap, height - ROW / 2), (at - gap - width, height - ROW / 2)]
    over = [(at - width / 2, height - gap - ROW), (at - width / 2, height + gap)]
    corners = [(left, top) for left in (at + DOT, at - DOT - width) for top in (height - DOT - ROW, height + DOT)]
    num_rows, num_columns = int((frame.bottom - frame.top) // ROW), int((frame.right - frame.left - width) // FONT)
    raster = [
        (frame.left + FONT * column, frame.top + ROW * row)
        for row in range(num_rows)
        for column in range(num_columns + 1)
    ]

    def away(box: Box) -> float:
        distance = math.hypot(max(box.left - at, at - box.right, 0.0), max(box.top - height, height - box.bottom, 0.0))
        return round(distance, 1) if distance >= DOT else math.inf

    near, far = (
        [Box(left, top, left + width, top + ROW) for left, top in corners_at]
        for corners_at in ((*beside, *over, *corners), raster)
    )
    return [*(box for box in near if _is_inside(box, frame)), *sorted(far, key=away)]


def _is_inside(box: Box, frame: Box) -> bool:
    return box.left >= frame.left and box.right <= frame.right and box.top >= frame.top and box.bottom <= frame.bottom


def _width(text: str) -> float:
    """What the text takes at most, about: Chinese, Japanese and Korean letters are as wide as high."""
    return FONT * sum(1.0 if unicodedata.east_asian_width(letter) in "WF" else LETTER for letter in text)


def _short(text: str, widest: float) -> str:
    """What fits of a text: its beginning and its end, which is what tells one name from the next."""
    whole = printable(text)
    short, left = whole, len(whole)
    while _width(short) > widest:
        left -= 1
        short = f"{whole[: left - left // 2]}...{whole[len(whole) - left // 2 :]}"
    return short


def _safe(text: str) -> str:
    return escape(printable(text))


def _bytes_text(num_bytes: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.4g} {unit}"
    return f"{num_bytes:.4g} B"


def _ms_text(latency_ms: float) -> str:
    return f"{latency_ms:.4g} ms"
