"""Heat maps over classes, as tables with colored cells. The color scale is the square root of the value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdpipe.pipeline.report.formatting import shortened

NUM_LEVELS = 9
"""Colors of a heat map: v0 to v8 in templates/style.css."""

MAX_DRAWN, MAX_WITH_NUMBERS = 30, 12
"""Classes up to which a heat map is drawn, and its cells show their numbers."""

Values = NDArray[np.float64]
Bounds = tuple[float, float]
Format = Callable[[float], str]


@dataclass(frozen=True)
class HeatMap:
    """A table of cells (CSS class, text, tooltip), each row with its name."""

    caption: str
    names: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[str, str, str]]]]


def heat_map(caption: str, values: Values, names: Sequence[str], form: Format, bounds: Bounds) -> HeatMap:
    """Return a heat map of values [C, C], NaN where there is none, colored between `bounds`."""
    levels = level_of(values, bounds)

    def cell(row: int, column: int) -> tuple[str, str, str]:
        value, level = float(values[row, column]), int(levels[row, column])
        if level < 0:
            return "none", "", ""
        text = form(value)
        shown = text.removesuffix(" %") if len(names) <= MAX_WITH_NUMBERS and value > 0 else ""
        return f"v{level}", shown, f"{names[row]} → {names[column]}: {text}"

    short = [shortened(name, 16) for name in names]
    rows = [(name, [cell(row, column) for column in range(len(names))]) for row, name in enumerate(short)]
    return HeatMap(caption, short, rows)


def level_of(values: Values, bounds: Bounds) -> NDArray[np.int64]:
    """Return the color of each value, int64 [C, C]; -1 for NaN."""
    (low, high), known = bounds, np.nan_to_num(values)
    share = np.sqrt(np.clip(known - low, 0, None) / (high - low)) if high > low else np.zeros_like(values)
    level = np.minimum((share * NUM_LEVELS).astype(np.int64), NUM_LEVELS - 1)
    return np.where(np.isnan(values), -1, level)


def legend(bounds: Bounds, form: Format) -> list[tuple[int, str]]:
    """Return some of the levels with their least values."""
    low, high = bounds
    return [(level, form(low + (high - low) * (level / NUM_LEVELS) ** 2)) for level in (0, 2, 4, 6, 8)]
