"""Heat maps over classes, as tables with colored cells. The color scale is the square root of the value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdpipe.pipeline.report.formatting import shortened

NUM_LEVELS = 9
"""Colors of a heat map: v0 to v8 in templates/style.css."""

MAX_WITH_NUMBERS, MAX_WITH_TIPS = 12, 30
"""Classes up to which cells show their number, and have a tooltip."""

Values = NDArray[np.float64]
Bounds = tuple[float, float]
Format = Callable[[float], str]


@dataclass(frozen=True)
class HeatMap:
    """A table of cells (CSS class, text, tooltip), each row with its name."""

    caption: str
    names: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[str, str, str]]]]
    is_large: bool


def heat_map(caption: str, values: Values, names: Sequence[str], form: Format, bounds: Bounds) -> HeatMap:
    """Return a heat map of values [C, C], NaN where there is none, colored between `bounds`."""
    count, levels = len(names), level_of(values, bounds)

    def cell(row: int, column: int) -> tuple[str, str, str]:
        value, level = float(values[row, column]), int(levels[row, column])
        if level < 0:
            return "none", "", ""
        shown = form(value)
        tip = f"{names[row]} → {names[column]}: {shown}" if count <= MAX_WITH_TIPS else ""
        return f"v{level}", shown.removesuffix(" %") if count <= MAX_WITH_NUMBERS and value > 0 else "", tip

    rows = [(shortened(names[row], 16), [cell(row, column) for column in range(count)]) for row in range(count)]
    return HeatMap(caption, [shortened(name, 16) for name in names], rows, count > MAX_WITH_TIPS)


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
