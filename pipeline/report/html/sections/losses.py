"""Losses by epoch: each term as weighted in the training loss, a chart and a table per network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import mean

from markupsafe import Markup

from kdpipe.pipeline.report.chart import add_axes, color, drawing, epoch_axis, log_axis, new_figure, svg, thinned
from kdpipe.pipeline.report.formatting import shortened
from kdpipe.pipeline.report.html.read import Network, PageRun
from kdpipe.pipeline.report.html.templating import LeftOutError
from kdpipe.pipeline.terminal.tables import Table

STYLES = (
    ("student", "solid"),
    ("alone", "dashed"),
    ("pruned", "dotted"),
    ("teacher", "solid"),
    ("wrong", "dashed"),
)
"""Color and line style by term; used again where there are more terms."""

MAX_DECADES = 6
"""Range of a chart below its largest value; smaller ones are drawn at the bottom."""

MAX_ROWS = 60
"""Epochs in a table; of more, every k-th is shown."""

WIDTH, HEIGHT = 340, 156

Terms = Mapping[str, Mapping[int, float]]


def losses(run: PageRun) -> dict[str, object]:
    """Return a chart with its legend and a table for each network.

    Raises:
        LeftOutError: If no loss is recorded.
    """
    found = {network.name: terms for network in run.networks if (terms := terms_of(network))}
    if not found:
        raise LeftOutError("No loss is recorded in this run yet.")
    charts = [(loss_panel(name, terms), _legend(terms)) for name, terms in found.items()]
    return {"charts": charts, "tables": [_table(name, terms) for name, terms in found.items()]}


def terms_of(network: Network) -> Terms:
    """Return each loss term by epoch, mean over the seeds where it is finite."""
    values: dict[str, dict[int, list[float]]] = {}
    for epoch in (epoch for job in network.jobs for epoch in job.epochs):
        for name, value in epoch.losses.items():
            if math.isfinite(value):
                values.setdefault(name, {}).setdefault(epoch.number, []).append(value)
    return {name: {epoch: mean(seeds) for epoch, seeds in sorted(by.items())} for name, by in values.items()}


@drawing()
def loss_panel(network: str, terms: Terms) -> Markup:
    values = [value for by_epoch in terms.values() for value in by_epoch.values()]
    low, high = min(values), max(values)
    figure = new_figure(WIDTH, HEIGHT)
    axes = add_axes(figure, 46, 26, WIDTH - 12, HEIGHT - 40)
    axes.set_title(shortened(f"{network}: losses", 40), loc="left", fontsize=12)
    epoch_axis(axes, max(max(by_epoch) for by_epoch in terms.values()))
    if low > 0:
        low = max(low, high / 10**MAX_DECADES)
        log_axis(axes, "y", low / 1.1, high * 1.1, "{:g}".format)
    else:
        axes.set_ylim(low, high if high > low else low + 1)
    for by_epoch, (_, shade, line) in zip(terms.values(), _legend(terms), strict=True):
        epochs, drawn = thinned(by_epoch)
        mark = "o" if len(epochs) == 1 else ""
        heights = [max(value, low) for value in drawn]
        axes.plot(epochs, heights, mark, color=color(shade), linestyle=line, linewidth=2, markersize=5)
    return svg(figure, f"{network}: losses by epoch", ", ".join(terms))


def _legend(terms: Terms) -> list[tuple[str, str, str]]:
    """Return name, color and line style of each term."""
    return [(term, *STYLES[number % len(STYLES)]) for number, term in enumerate(terms)]


def _table(network: str, terms: Terms) -> Table:
    epochs, _ = thinned({epoch: 0.0 for by_epoch in terms.values() for epoch in by_epoch}, MAX_ROWS)
    rows = [[epoch, *(f"{by[epoch]:.4g}" if epoch in by else "-" for by in terms.values())] for epoch in epochs]
    return Table(f"{network}: losses by epoch", ["epoch", *terms], rows)
