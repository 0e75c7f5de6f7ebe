"""Format accuracies, shares, sizes and names for tables and charts."""

from __future__ import annotations

import math

from kdpipe.pipeline.terminal.output import printable
from kdpipe.stages.evaluation.intervals import Interval


def mean_std(mean: float | None, std: float | None = None, *, digits: int = 2, signed: bool = False) -> str:
    """Return "mean ± std", the mean alone without a deviation, or "-"."""
    if mean is None:
        return "-"
    return f"{mean:{'+' if signed else ''}.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def interval_text(interval: Interval | None, *, signed: bool = False) -> str:
    """Return an interval such as "96.10 to 98.31 over images", or "-"."""
    if interval is None:
        return "-"
    low, high = (mean_std(value, signed=signed) for value in (interval.low, interval.high))
    return f"{low} to {high} over {interval.over}"


def share(value: float | None) -> str:
    """Return a share as a whole number of percent."""
    return "-" if value is None else f"{100 * value:.0f} %"


def percent(value: float) -> str:
    """Return a share in percent with about two significant digits."""
    if not math.isfinite(value):
        return "-"
    if abs(value) < 5e-5:
        return "0 %"
    digits = 0 if value >= 0.0995 else 1 if value >= 0.001 else 2
    return f"{100 * value:.{digits}f} %"


def count(value: float) -> str:
    """Return a mean count, with one decimal where it is small and not whole."""
    return f"{value:.0f}" if value >= 9.95 or value == round(value) else f"{value:.1f}"


def integer(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def kib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1024:.1f} KiB"


def bytes_text(num_bytes: float) -> str:
    """Return a size in decimal units with up to four significant digits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.4g} {unit}"
    return f"{num_bytes:.4g} B"


def size_ratio(times_smaller: float | None) -> str:
    """Return a file's size relative to another's: "1/12.3", or a factor where it is larger."""
    if times_smaller is None:
        return "-"
    return f"1/{times_smaller:.1f}" if times_smaller >= 1 else f"{1 / times_smaller:.1f}"


def num_seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


def shortened(text: str, max_letters: int) -> str:
    """Return at most `max_letters` of a printable text: its beginning and its end, which tell names apart."""
    whole = printable(text)
    if len(whole) <= max_letters:
        return whole
    tail = (max_letters - 1) // 3
    return f"{whole[: max_letters - 1 - tail]}…{whole[len(whole) - tail :] if tail else ''}"
