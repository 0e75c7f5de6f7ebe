"""Learning curves: test accuracy by epoch, one panel per network on equal axes, and the loss terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from markupsafe import Markup

from pipeline.report.chart import (
    add_axes,
    color,
    drawable_errors,
    drawing,
    epoch_axis,
    error_axis,
    new_figure,
    spread,
    svg,
    thinned,
)
from pipeline.report.formatting import mean_std, shortened
from pipeline.report.html.read import Network, PageRun
from pipeline.report.html.sections.losses import loss_panel, loss_table
from pipeline.report.html.templating import LeftOutError
from pipeline.report.quality import mean_and_std
from pipeline.report.tables import Table

MAX_ROWS = 60
"""Epochs in a table; of more, every k-th is shown."""

WIDTH, HEIGHT = 340, 236


@dataclass(frozen=True)
class Curve:
    """A network's test accuracies in percent by epoch, a mapping per seed."""

    name: str
    color: str
    line: str
    seeds: Sequence[Mapping[int, float]]

    @property
    def mean(self) -> dict[int, float]:
        """Mean over the seeds, for the epochs that all seeds have reached."""
        common = set.intersection(*(set(seed) for seed in self.seeds)) if self.seeds else set()
        return {epoch: mean(seed[epoch] for seed in self.seeds) for epoch in sorted(common)}


@dataclass(frozen=True)
class Range:
    """Epochs and accuracies that all panels have room for."""

    num_epochs: int
    accuracies: Sequence[float]


def curves_of(networks: Iterable[Network]) -> list[Curve]:
    """Return the curves of networks of which an epoch is recorded."""
    return [
        Curve(network.name, network.color, network.line, seeds)
        for network in networks
        if (seeds := [{one.number: one.accuracy for one in job.epochs} for job in network.jobs if job.epochs])
    ]


def range_of(curves: Iterable[Curve]) -> Range:
    """Return the common range of curves, of which there must be one."""
    seeds = [seed for curve in curves for seed in curve.seeds]
    return Range(max(max(seed) for seed in seeds), [accuracy for seed in seeds for accuracy in seed.values()])


def legend(curves: Iterable[Curve]) -> list[tuple[str, str, str]]:
    """Return name, color and line style of each kind of curve."""
    return list({curve.color: (curve.name, curve.color, curve.line) for curve in curves}.values())


def learning_curves(run: PageRun) -> dict[str, object]:
    """Return the charts of a run.

    Raises:
        LeftOutError: If no epoch is recorded.
    """
    curves = curves_of(run.main)
    if not curves:
        raise LeftOutError("No training epoch is recorded in this run yet.")
    common = range_of(curves)
    loss_tables = [made for network in run.main if (made := loss_table(network, MAX_ROWS)) is not None]
    num_damaged = {network.name: sum(job.num_damaged for job in network.jobs) for network in run.main}
    return {
        "charts": [
            curve_panel(one.name, [one], [other for other in curves if other is not one], common) for one in curves
        ],
        "legend": legend(curves),
        "loss_charts": [made for network in run.main if (made := loss_panel(network)) is not None],
        "numbers": [_table(curves), *loss_tables],
        "damaged": [f"{number} of {name}" for name, number in num_damaged.items() if number],
    }


@drawing()
def curve_panel(title: str, strong: Sequence[Curve], faint: Sequence[Curve], common: Range) -> Markup:
    """Draw the seeds and means of the `strong` curves, and the means of the `faint` ones."""
    figure = new_figure(WIDTH, HEIGHT)
    axes = add_axes(figure, 40, 30, WIDTH - 50, HEIGHT - 40)
    axes.set_title(shortened(title, 26), loc="left", fontsize=13)
    axes.set_title("test accuracy, %", loc="right", fontsize=11, color=color("quiet"))
    epoch_axis(axes, common.num_epochs)
    error_axis(axes, common.accuracies)

    def draw(by_epoch: Mapping[int, float], name: str, line: str, width: float, opacity: float = 1.0) -> None:
        epochs, accuracies = thinned(by_epoch)
        errors = drawable_errors(accuracies, common.accuracies)
        axes.plot(epochs, errors, color=color(name), linestyle=line, linewidth=width, alpha=opacity)

    for curve in faint:
        draw(curve.mean, "quiet", "dashed", 1.2, 0.45)
    for curve in strong:
        for seed in curve.seeds:
            draw(seed, curve.color, "solid", 0.8, 0.5)
        draw(curve.mean, curve.color, curve.line, 2.4)
    last_values = [(curve, max(average), average[max(average)]) for curve in strong if (average := curve.mean)]
    errors = drawable_errors([value for _, _, value in last_values], common.accuracies)
    heights = axes.transData.transform([(1, error) for error in errors])[:, 1] if errors else []
    for (curve, epoch, value), error, height, place in zip(
        last_values, errors, heights, spread([-one for one in heights], 13, 0), strict=True
    ):
        axes.plot([epoch], [error], "o", color=color(curve.color), markersize=5)
        axes.annotate(
            f"{value:.2f}",
            (epoch, error),
            (7, -place - height),
            textcoords="offset points",
            va="center",
            color=color(curve.color),
            fontweight="bold",
        )
    ends = [f"{curve.name} ends at {mean_std(*mean_and_std(_last(curve)))} %" for curve in strong]
    return svg(figure, f"{title}: test accuracy by epoch", ", ".join(ends))


def _last(curve: Curve) -> list[float]:
    """Return the seeds' accuracies after the last epoch that all have reached."""
    return [seed[max(curve.mean)] for seed in curve.seeds] if curve.mean else []


def _table(curves: Sequence[Curve]) -> Table:
    epochs, _ = thinned(
        dict.fromkeys((epoch for curve in curves for seed in curve.seeds for epoch in seed), 0.0), MAX_ROWS
    )
    rows = [
        [epoch, *(mean_std(*mean_and_std([seed[epoch] for seed in one.seeds if epoch in seed])) for one in curves)]
        for epoch in epochs
    ]
    return Table("Test accuracy by epoch, %", ["epoch", *(one.name for one in curves)], rows)
