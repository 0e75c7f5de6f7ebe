"""Learning curves: test accuracy by epoch, a panel a network, all on the same axes; and the losses meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from pipeline.page.chart import (
    SMALL,
    ErrorAxis,
    Frame,
    epoch_axis,
    epoch_ticks,
    error_axis,
    level_line,
    spread,
    stroke,
    svg,
    words,
)
from pipeline.page.losses import loss_panel, loss_rows
from pipeline.page.markup import Html, LeftOutError, details, figure, join, key, note, safe, short, table, tables
from pipeline.page.read import Network, PageRun
from pipeline.report.examined import with_spread

FRAME = Frame(width=340, height=236, left=38, top=30, right=292, bottom=196)

MOST_POINTS = 300
"""A curve of more epochs is thinned to about so many."""

MOST_ROWS = 60


@dataclass(frozen=True)
class Curve:
    """A network's accuracies by epoch, a mapping a seed."""

    name: str
    colour: str
    seeds: Sequence[Mapping[int, float]]

    @property
    def mean(self) -> dict[int, float]:
        """Over the seeds, as far as the slowest has come."""
        common = set.intersection(*(set(seed) for seed in self.seeds)) if self.seeds else set()
        return {epoch: mean(seed[epoch] for seed in self.seeds) for epoch in sorted(common)}


@dataclass(frozen=True)
class Axes:
    num_epochs: int
    accuracy: ErrorAxis


def curve_of(network: Network) -> Curve:
    seeds = [{one.number: one.accuracy for one in job.epochs} for job in network.jobs if job.epochs]
    return Curve(network.name, network.colour, seeds)


def axes_for(curves: Iterable[Curve]) -> Axes:
    """Axes with room for all curves. Raises LeftOutError where there is not one epoch."""
    seeds = [seed for curve in curves for seed in curve.seeds]
    if not seeds:
        raise LeftOutError("No epoch of a training is recorded in this run yet.")
    accuracies = [accuracy for seed in seeds for accuracy in seed.values()]
    return Axes(max(max(seed) for seed in seeds), error_axis(accuracies, FRAME.bottom, FRAME.top))


def learning_curves(run: PageRun) -> Html:
    """The section of one run."""
    networks = [one for one in run.main if any(job.epochs for job in one.jobs)]
    curves = [curve_of(one) for one in networks]
    axes = axes_for(curves)
    panels = [curve_panel(curve.name, [curve], [one for one in curves if one is not curve], axes) for curve in curves]
    keys = join([key(curve.colour, curve.name) for curve in curves])
    caption = join(
        [
            "Thin: one seed. Thick: their mean, with its last value. Grey and dashed: the other networks' means. "
            "Heights go by the logarithm of the errors that are left.",
            Html(f'<span class="keys">{keys}</span>'),
        ]
    )
    numbers = table("Test accuracy by epoch, %", ["epoch", *(one.name for one in curves)], _rows(curves))
    return join(
        [
            figure(caption, *panels),
            _losses(networks),
            details("These curves as tables", tables([numbers, *(loss_rows(one, MOST_ROWS) for one in networks)])),
            _damaged(networks),
        ]
    )


def curve_panel(title: str, strong: Sequence[Curve], faint: Sequence[Curve], axes: Axes) -> Html:
    """One panel: seeds and means of the `strong` curves, means of the others."""
    x, y = epoch_axis(FRAME, axes.num_epochs), axes.accuracy
    parts: list[Html] = [words(6, 16, short(title, 30), size=13), *_grid(axes)]
    for curve in faint:
        parts.append(stroke("faded", [(x.place(at), y.place(one)) for at, one in thinned(curve.mean)]))
    lasts = [curve.mean for curve in strong]
    heights = [y.place(average[max(average)]) if average else 0.0 for average in lasts]
    for curve, average, height in zip(strong, lasts, spread(heights, SMALL + 2, FRAME.bottom - 3), strict=True):
        group = [stroke("thin", [(x.place(at), y.place(one)) for at, one in thinned(seed)]) for seed in curve.seeds]
        if average:
            last = max(average)
            group.append(stroke("mean", [(x.place(at), y.place(one)) for at, one in thinned(average)]))
            group.append(
                Html(f'<circle class="end" cx="{x.place(last):.1f}" cy="{y.place(average[last]):.1f}" r="3"/>')
            )
            group.append(words(x.place(last) + 7, height + 4, f"{average[last]:.2f}", kind="of"))
        parts.append(join([Html(f'<g class="{curve.colour}">'), *group, Html("</g>")]))
    ends = ", ".join(f"{one.name} ends at {with_spread(*_last(one))} %" for one in strong)
    return svg(FRAME, f"{title}: test accuracy by epoch", ends, parts)


def _grid(axes: Axes) -> list[Html]:
    x, y = epoch_axis(FRAME, axes.num_epochs), axes.accuracy
    lines = [level_line(FRAME, y.place(one), f"{one:g}") for one in y.ticks()]
    return [*lines, *epoch_ticks(FRAME, x), words(FRAME.width, 16, "test accuracy, %", anchor="end", kind="tick")]


def thinned(by_epoch: Mapping[int, float]) -> list[tuple[int, float]]:
    """The points of a curve: every k-th of many, and always the last."""
    points = sorted(by_epoch.items())
    step = math.ceil(len(points) / MOST_POINTS) or 1
    return points[::step] + ([points[-1]] if (len(points) - 1) % step else [])


def _last(curve: Curve) -> tuple[float | None, float | None]:
    """Mean and deviation over the seeds at the last epoch that all have."""
    average = curve.mean
    if not average:
        return None, None
    ends = [seed[max(average)] for seed in curve.seeds]
    return mean(ends), stdev(ends) if len(ends) > 1 else None


def _rows(curves: Sequence[Curve]) -> list[list[object]]:
    epochs = sorted({epoch for curve in curves for seed in curve.seeds for epoch in seed})
    step = math.ceil(len(epochs) / MOST_ROWS) or 1
    chosen = epochs[::-1][::step][::-1]
    return [
        [epoch, *(_cell([seed[epoch] for seed in curve.seeds if epoch in seed]) for curve in curves)]
        for epoch in chosen
    ]


def _cell(found: Sequence[float]) -> str:
    return with_spread(mean(found) if found else None, stdev(found) if len(found) > 1 else None)


def _losses(networks: Sequence[Network]) -> Html:
    panels = [panel for one in networks if (panel := loss_panel(one)) is not None]
    if not panels:
        return Html()
    return figure("The terms that training makes small, weighted as they are summed, mean over the seeds.", *panels)


def _damaged(networks: Sequence[Network]) -> Html:
    damaged = {f"{one.name}": sum(job.num_damaged for job in one.jobs) for one in networks}
    named = [f"{num} of {name}" for name, num in damaged.items() if num]
    return note(f"Lines of metrics.jsonl that cannot be read are left out: {', '.join(named)}.") if named else safe("")
