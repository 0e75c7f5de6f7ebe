"""A heat map over classes: one hue, darker (on a dark page lighter) for more; the colour goes with the square root."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.page.chart import Frame, svg, words
from pipeline.page.markup import Html, element, join, safe, scrolling, short
from pipeline.page.style import NUM_LEVELS

MOST_WITH_NUMBERS = 12
"""With up to so many classes there is room for a number in each cell."""

MOST_WITH_TIPS = 30
"""With up to so many, each cell says what it is when it is pointed at."""

Values = NDArray[np.float64]
Format = Callable[[float], str]

Ends = tuple[float, float]
"""The values that get the first colour and the last."""


def heat_map(title: str, desc: str, values: Values, names: Sequence[str], form: Format, *, ends: Ends) -> Html:
    """values [C, C], row by row, NaN where there is none, coloured between the `ends`. In a box that scrolls."""
    count = len(names)
    side, letter = (26.0, 11.0) if count <= MOST_WITH_NUMBERS else (max(9.0, 26.0 - count / 5), 8.0)
    longest = max((len(short(name, 16)) for name in names), default=1)
    margin = 0.62 * letter * longest + 8
    edge = margin + side * count
    frame = Frame(edge + 2, edge + 2, margin, margin, edge, edge)
    levels = level_of(values, ends)
    if count <= MOST_WITH_TIPS:
        cells = list(_cells(values, levels, names, frame, form))
    else:
        cells = list(_runs(levels, frame, side))
    drawn = svg(frame, title, desc, [*_names(names, frame, side, letter), *cells], "heat")
    width = f"width:{edge + 2:.0f}px;max-width:none" if count > MOST_WITH_TIPS else f"max-width:{1.5 * edge:.0f}px"
    return scrolling(element("div", drawn, style=width), title)


def level_of(values: Values, ends: Ends) -> NDArray[np.int64]:
    """Which colour each value has, int64 [C, C]; -1 for NaN."""
    (low, high), known = ends, np.nan_to_num(values)
    share = np.sqrt(np.clip(known - low, 0, None) / (high - low)) if high > low else np.zeros_like(values)
    level = np.minimum((share * NUM_LEVELS).astype(np.int64), NUM_LEVELS - 1)
    return np.where(np.isnan(values), -1, level)


def legend(ends: Ends, form: Format) -> Html:
    """Some of the colours, and from which value on each one is used."""
    low, high = ends
    shown = (0, NUM_LEVELS // 4, NUM_LEVELS // 2, 3 * NUM_LEVELS // 4, NUM_LEVELS - 1)
    steps = (
        element("span", element("i", kind=f"v{level}"), f"from {form(low + (high - low) * (level / NUM_LEVELS) ** 2)}")
        for level in shown
    )
    return element("span", *steps, kind="steps")


def _names(names: Sequence[str], frame: Frame, side: float, letter: float) -> Iterator[Html]:
    for at, name in enumerate(names):
        middle = frame.left + side * (at + 0.5)
        text = short(name, 16)
        yield words(frame.left - 5, middle + 0.35 * letter, text, anchor="end", size=letter)
        yield Html(
            f'<text font-size="{letter:g}" transform="translate({middle + 0.35 * letter:.1f} {frame.top - 5:.1f})'
            f' rotate(-90)">{safe(text)}</text>'
        )


def _cells(
    values: Values, levels: NDArray[np.int64], names: Sequence[str], frame: Frame, form: Format
) -> Iterator[Html]:
    side = (frame.right - frame.left) / len(names)
    for row, column in np.ndindex(values.shape):
        x, y, level = frame.left + side * column, frame.top + side * row, int(levels[row, column])
        shown = form(float(values[row, column])) if level >= 0 else ""
        kind = f"v{level}" if level >= 0 else "none"
        tip = f"{names[row]} → {names[column]}: {shown}" if level >= 0 else names[row]
        yield Html(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}">'
            f"<title>{safe(tip)}</title></rect>"
        )
        if len(names) <= MOST_WITH_NUMBERS and level >= 0 and values[row, column] > 0:
            yield words(
                x + side / 2, y + side / 2 + 3, shown.removesuffix(" %"), anchor="middle", kind=f"t{level}", size=8.5
            )


def _runs(levels: NDArray[np.int64], frame: Frame, side: float) -> Iterator[Html]:
    """All cells of a colour as one path, neighbours joined: ten thousand cells stay small."""
    drawn: list[list[str]] = [[] for _ in range(NUM_LEVELS)]
    for row, line in enumerate(levels):
        starts = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), len(line)]
        for start, end in pairwise(starts):
            if line[start] >= 0:
                drawn[line[start]].append(f"M{start} {row}h{end - start}v1h{start - end}z")
    place = f"translate({frame.left:.1f} {frame.top:.1f}) scale({side:g})"
    paths = (f'<path class="v{level}" d="{"".join(one)}"/>' for level, one in enumerate(drawn) if one)
    yield join([Html(f'<g transform="{place}">'), *map(Html, paths), Html("</g>")])


def percent(value: float) -> str:
    """A share in percent, with two figures that count."""
    if not math.isfinite(value):
        return "-"
    if abs(value) < 5e-5:
        return "0 %"
    return (
        f"{100 * value:.0f} %"
        if value >= 0.0995
        else f"{100 * value:.1f} %"
        if value >= 0.001
        else f"{100 * value:.2f} %"
    )
