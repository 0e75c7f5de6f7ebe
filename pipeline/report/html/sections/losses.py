"""Loss terms of a network by epoch, as a chart."""

from __future__ import annotations

import math
from statistics import mean

from markupsafe import Markup

from kdpipe.pipeline.report.chart import add_axes, color, drawing, epoch_axis, log_axis, new_figure, svg, thinned
from kdpipe.pipeline.report.formatting import shortened
from kdpipe.pipeline.report.html.read import Network

STYLES = (
    ("student", "solid"),
    ("alone", "dashed"),
    ("compressed", "dotted"),
    ("right", "dashdot"),
    ("other", "solid"),
    ("wrong", "dashed"),
)
"""Color and line style by term; used again where there are more terms."""

MAX_DECADES = 6
"""Range of the chart below the largest value; smaller ones are drawn at its bottom."""

WIDTH, HEIGHT = 340, 156

Legend = list[tuple[str, str, str]]


def terms_of(network: Network) -> dict[str, dict[int, float]]:
    """Return each loss term by epoch, mean over the seeds where it is finite."""
    values: dict[str, dict[int, list[float]]] = {}
    for job in network.jobs:
        for epoch in job.epochs:
            for name, value in epoch.losses.items():
                if math.isfinite(value):
                    values.setdefault(name, {}).setdefault(epoch.number, []).append(value)
    return {name: {epoch: mean(found) for epoch, found in sorted(by.items())} for name, by in values.items()}


@drawing()
def loss_panel(network: Network) -> tuple[Markup, Legend] | None:
    """Return the chart and its legend; None if no loss is recorded."""
    terms = terms_of(network)
    if not terms:
        return None
    values = [value for by_epoch in terms.values() for value in by_epoch.values()]
    low, high = min(values), max(values)
    figure = new_figure(WIDTH, HEIGHT)
    axes = add_axes(figure, 46, 26, WIDTH - 12, HEIGHT - 40)
    axes.set_title(shortened(f"{network.name}: losses", 40), loc="left", fontsize=12)
    epoch_axis(axes, max(max(by_epoch) for by_epoch in terms.values()))
    if low > 0:
        low = max(low, high / 10**MAX_DECADES)
        log_axis(axes, "y", low / 1.1, high * 1.1, "{:g}".format)
    else:
        axes.set_ylim(low, high if high > low else low + 1)
    styles = [STYLES[number % len(STYLES)] for number in range(len(terms))]
    for by_epoch, (name, line) in zip(terms.values(), styles, strict=True):
        epochs, found = thinned(by_epoch)
        axes.plot(epochs, [max(value, low) for value in found], color=color(name), linestyle=line, linewidth=2)
    drawn = svg(figure, f"{network.name}: losses by epoch", ", ".join(terms))
    lines = {"dashdot": "double"}  # CSS has no line of dashes and dots
    return drawn, [(term, name, lines.get(line, line)) for term, (name, line) in zip(terms, styles, strict=True)]
