"""The losses of a network by epoch: small curves of each term, and their table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean

from pipeline.page.chart import Frame, epoch_axis, epoch_ticks, level_line, stroke, svg, words
from pipeline.page.markup import Html, element, join, key, safe, table
from pipeline.page.read import Network
from pipeline.report.pareto import Axis, nice_step

FRAME = Frame(width=340, height=156, left=46, top=26, right=328, bottom=118)

NUM_STYLES = 6
"""Kinds of line that the page's style tells apart."""

MOST_DECADES = 6
"""What is smaller than the largest term by more is drawn at the bottom."""


def terms_of(network: Network) -> dict[str, dict[int, float]]:
    """Each term by epoch, counted from 1: the mean over the seeds that have it as a number."""
    held: dict[str, dict[int, list[float]]] = {}
    for job in network.jobs:
        for epoch in job.epochs:
            for name, value in epoch.losses.items():
                if math.isfinite(value):
                    held.setdefault(name, {}).setdefault(epoch.number, []).append(value)
    return {name: {at: mean(found) for at, found in sorted(by.items())} for name, by in held.items()}


def loss_panel(network: Network) -> Html | None:
    """The panel with its legend; None where no loss is recorded."""
    terms = terms_of(network)
    if not terms:
        return None
    values = [value for by_epoch in terms.values() for value in by_epoch.values()]
    x = epoch_axis(FRAME, max(max(by_epoch) for by_epoch in terms.values()))
    y, ticks = _axis(values)
    parts: list[Html] = [words(6, 14, f"{network.name}: losses", size=12)]
    parts += [level_line(FRAME, y.place(one), f"{one:g}") for one in ticks]
    parts += epoch_ticks(FRAME, x)
    for number, by_epoch in enumerate(terms.values()):
        step = math.ceil(len(by_epoch) / 300) or 1
        points = [(x.place(at), y.place(max(value, y.low))) for at, value in list(by_epoch.items())[::step]]
        parts.append(join([Html(f'<g class="l{number % NUM_STYLES}">'), stroke("mean", points), Html("</g>")]))
    drawn = svg(FRAME, f"{network.name}: losses by epoch", ", ".join(terms), parts)
    keys = [key(f"l{number % NUM_STYLES}", name) for number, name in enumerate(terms)]
    return element("div", drawn, element("div", *keys, kind="keys note"))


def _axis(values: Sequence[float]) -> tuple[Axis, list[float]]:
    """In decades where all losses are above 0; and its ticks."""
    low, high = min(values), max(values)
    if low > 0:
        low = max(low, high / 10**MOST_DECADES)
        decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        factors = (1, 3) if len(decades) <= 2 else (1,)
        powers = decades[:: math.ceil(len(decades) / 4) or 1]
        axis = Axis(low / 1.1, high * 1.1, FRAME.bottom, FRAME.top, log=True)
        ticks = [factor * 10.0**power for power in (min(powers, default=0) - 1, *powers) for factor in factors]
        if high < 10 * low:
            ticks = _evenly(axis.low, axis.high)
    else:
        axis = Axis(low, high if high > low else low + 1, FRAME.bottom, FRAME.top, log=False)
        ticks = _evenly(axis.low, axis.high)
    return axis, [one for one in ticks if axis.low <= one <= axis.high]


def _evenly(low: float, high: float) -> list[float]:
    step = nice_step((high - low) / 3)
    return [step * at for at in range(math.floor(low / step), math.ceil(high / step) + 1)]


def loss_rows(network: Network, most: int) -> Html:
    """The table of the terms, thinned to `most` epochs."""
    terms: Mapping[str, Mapping[int, float]] = terms_of(network)
    if not terms:
        return safe("")
    epochs = sorted({epoch for by_epoch in terms.values() for epoch in by_epoch})
    chosen = epochs[::-1][:: math.ceil(len(epochs) / most)][::-1]
    cells = ([at, *(f"{by[at]:.4g}" if at in by else "-" for by in terms.values())] for at in chosen)
    return table(f"{network.name}: losses by epoch", ["epoch", *terms], cells)
