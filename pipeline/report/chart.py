"""Draw charts with matplotlib as deterministic SVG text whose colors are CSS variables, for light and dark pages.

matplotlib is imported when a chart is drawn, not before. Figures are made without pyplot, so no display is opened.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from kdpipe.pipeline.terminal.output import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NETWORKS = ["teacher", "alone", "student", "pruned", "quantized", "unpruned", "calibrated"]
COLORS = ["ink", "quiet", "faint", "paper", "wrong", *NETWORKS]
"""CSS variables of the page, see templates/colors.css."""


MIN_TICK_DISTANCE = 0.13
"""Of two ticks on a logarithmic axis, in lengths of the axis."""


def color(name: str) -> str:
    """Return the placeholder that stands for a CSS variable while matplotlib draws."""
    return f"#fe00{COLORS.index(name):02x}"


def _settings() -> Any:
    quiet = color("quiet")
    return {
        "axes.axisbelow": True,
        "axes.edgecolor": quiet,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": quiet,
        "axes.labelsize": 11,
        "axes.titlepad": 8,
        "figure.facecolor": "none",
        "font.size": 11,
        "grid.color": color("faint"),
        "svg.fonttype": "none",
        "svg.hashsalt": "kdpipe",
        "text.color": color("ink"),
        "text.parse_math": False,  # names are untrusted: "$" is text
        **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
        **{f"{axis}tick.{size}.size": 0 for axis in "xy" for size in ("major", "minor")},
        **{f"{axis}tick.labelcolor": quiet for axis in "xy"},
    }


@contextmanager
def drawing() -> Iterator[None]:
    """Apply the charts' matplotlib settings, regardless of the user's own; also usable as a decorator."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # an unwritable home: a temporary cache is used silently
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the measuring font lacks: the browser has its own fonts
        mpl.rcdefaults()
        mpl.rcParams.update(_settings())
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in SVG user units."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72))


def add_axes(figure: Figure, left: float, top: float, right: float, bottom: float) -> Axes:
    """Add axes at a rectangle in user units, measured from the figure's upper left corner."""
    width, height = figure.get_size_inches() * 72
    return figure.add_axes((left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height))


def svg(figure: Figure, title: str, description: str = "") -> Markup:
    """Return the figure as an <svg> element without ids of groups, fonts, references to other places or sizes."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    box = re.search(r'viewBox="[\d. ]+"', text)
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<defs>\s*<(style|clipPath).*?</\1>\s*</defs>|<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r' clip-path="[^"]*"| font-family: [^;"]*;?|(?<=<g) id="[^"]*"|(?<= )xlink:(?=href)', "", body)
    body = re.sub(r"(fill|stroke): #fe00(\w\w)", lambda match: f"{match[1]}: var(--{COLORS[int(match[2], 16)]})", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*"|<g/>', "", body)
    body = re.sub("<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), body)  # hundredths of a unit are enough
    body = re.sub(r"\s*\n\s*", "\n", body)
    named = f"<title>{escape(printable(title))}</title><desc>{escape(printable(description))}</desc>"
    return Markup(f'<svg class="chart" {box[0] if box else ""} role="img">{named}{body.strip()}')


def with_unique_ids(page: str) -> str:
    """Number the ids inside the page's charts: each chart has its own name space."""
    numbers = count()

    def renamed(chart: re.Match[str]) -> str:
        prefix = f"c{next(numbers)}-"
        return re.sub(r'( id="|href="#)', rf"\g<1>{prefix}", chart[0])

    return re.sub(r'<svg class="chart".*?</svg>', renamed, page, flags=re.S)


def error_axis(axes: Axes, accuracies: Sequence[float]) -> None:
    """Scale the y axis of accuracies in percent by the logarithm of the error: 98 to 99 is as far as 90 to 95.

    100 % is at half the least other error, with a tick of its own.
    """
    least = min((100 - accuracy for accuracy in accuracies if accuracy < 100), default=1.0)
    is_perfect, high = max(accuracies) >= 100, max(least, 100 - min(accuracies))
    low = least / 2 if is_perfect else least
    margin = max((high / low) ** 0.06, 1.01)
    low, high = low / margin, high * margin
    axes.set_yscale(
        "function", functions=(lambda y: -np.log(np.maximum(100 - y, least / 2)), lambda y: 100 - np.exp(-y))
    )
    errors = [error for error in _log_ticks(low, high) if error >= least or not is_perfect]
    axes.set(ylim=(100 - high, 100 - low), yticks=[100 - error for error in errors] + [100.0] * is_perfect)
    axes.yaxis.set_major_formatter(lambda accuracy, _: f"{accuracy:.4g}")


def log_axis(axes: Axes, name: str, low: float, high: float, form: Callable[[float], str]) -> None:
    """Make the x or y axis logarithmic from `low` to `high`."""
    axes.set(**{f"{name}scale": "log", f"{name}lim": (low, high), f"{name}ticks": _log_ticks(low, high)})
    axes.minorticks_off()
    (axes.xaxis if name == "x" else axes.yaxis).set_major_formatter(lambda value, _: form(value))


def _log_ticks(low: float, high: float) -> list[float]:
    """Return about three to six round values."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    candidates = [MaxNLocator(4).tick_values(low, high)] if high < 5 * low else []
    candidates += [LogLocator(subs=subs, numticks=5).tick_values(low, high) for subs in ((1,), (1, 3), (1, 2, 5))]
    ticks = [[float(tick) for tick in found if low <= tick <= high] for found in candidates]
    found = next((found for found in ticks if len(found) >= 3), ticks[-1])
    room, kept = math.log(high / low) * MIN_TICK_DISTANCE, found[:1]
    for tick in found[1:]:
        kept += [tick] if math.log(tick / kept[-1]) >= room else []
    return kept


def epoch_axis(axes: Axes, num_epochs: int) -> None:
    """Set the x axis of epochs, counted from 1."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(1, max(2, num_epochs))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("epoch")


def thinned(by_epoch: Mapping[int, float], max_points: int = 120) -> tuple[list[int], list[float]]:
    """Return epochs and values of a curve: every k-th of many, and always the last."""
    epochs = sorted(by_epoch)
    chosen = epochs[:: len(epochs) // -max_points][::-1] if epochs else []
    return chosen, [by_epoch[epoch] for epoch in chosen]


def spread(positions: Sequence[float], distance: float, end: float) -> list[float]:
    """Return the positions moved so that labels there are `distance` apart and none is beyond `end`."""
    order = sorted(range(len(positions)), key=lambda number: positions[number])
    moved = list(positions)
    for before, number in pairwise(order):
        moved[number] = max(moved[number], moved[before] + distance)
    for num_after, number in enumerate(reversed(order)):
        moved[number] = min(moved[number], end - num_after * distance)
    return moved
