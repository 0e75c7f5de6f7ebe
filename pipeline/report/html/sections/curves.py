"""Learning curves: test or validation accuracy by epoch, one panel per network on equal axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from markupsafe import Markup

from kdpipe.pipeline.report.chart import add_axes, color, drawing, epoch_axis, error_axis, new_figure, svg, thinned
from kdpipe.pipeline.report.formatting import mean_std, shortened
from kdpipe.pipeline.report.html.read import Network, PageRun
from kdpipe.pipeline.report.html.templating import LeftOutError
from kdpipe.pipeline.report.rows import mean_and_std

WIDTH, HEIGHT = 340, 236


@dataclass(frozen=True)
class Curve:
    """A network's accuracies on a split in percent by epoch, a mapping per seed."""

    name: str
    color: str
    line: str
    seeds: Sequence[Mapping[int, float]]
    split: str = "test"

    @property
    def mean(self) -> dict[int, float]:
        """Mean over the seeds, for the epochs that all seeds have reached."""
        common = set.intersection(*(set(seed) for seed in self.seeds)) if self.seeds else set()
        return {epoch: mean(seed[epoch] for seed in self.seeds) for epoch in sorted(common)}

    @property
    def last(self) -> tuple[float | None, float | None]:
        """Mean and standard deviation after the last epoch that all seeds have reached."""
        return mean_and_std([seed[max(self.mean)] for seed in self.seeds] if self.mean else [])


def curves_of(networks: Iterable[Network]) -> list[Curve]:
    """Return the curves of networks of which an epoch is recorded."""
    return [
        Curve(network.name, network.color, network.line, seeds, trained[0].epochs[0].split)
        for network in networks
        if (trained := [job for job in network.jobs if job.epochs])
        and (seeds := [{epoch.number: epoch.accuracy for epoch in job.epochs} for job in trained])
    ]


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
    return {
        "charts": [curve_panel(curve.name, [curve], curves, show_others=True) for curve in curves],
        "legend": legend(curves),
    }


@drawing()
def curve_panel(title: str, strong: Sequence[Curve], together: Sequence[Curve], *, show_others: bool = False) -> Markup:
    """Draw the seeds and means of `strong` curves on axes with room for all `together`, and these faintly if asked."""
    figure = new_figure(WIDTH, HEIGHT)
    axes = add_axes(figure, 40, 30, WIDTH - 50, HEIGHT - 40)
    axes.set_title(shortened(title, 26), loc="left", fontsize=13)
    axes.set_title(f"{together[0].split} accuracy, %", loc="right", fontsize=11, color=color("quiet"))
    seeds = [seed for curve in together for seed in curve.seeds]
    epoch_axis(axes, max(max(seed) for seed in seeds))
    error_axis(axes, [accuracy for seed in seeds for accuracy in seed.values()])
    for curve in (other for other in together if show_others and other not in strong):
        axes.plot(*thinned(curve.mean), "--", color=color("quiet"), linewidth=1.2, alpha=0.45)
    ends = []
    for number, curve in enumerate(sorted(strong, key=lambda curve: curve.last[0] or 0.0)):
        shade = color(curve.color)
        for seed in curve.seeds:
            axes.plot(*thinned(seed), color=shade, linewidth=0.8, alpha=0.5)
        axes.plot(*thinned(curve.mean), color=shade, linestyle=curve.line, linewidth=2.4)
        average, _ = curve.last
        ends.append(f"{curve.name} ends at {mean_std(*curve.last)} %")
        if average is not None:
            epoch, side = max(curve.mean), "center" if len(strong) == 1 else "bottom" if number else "top"
            axes.plot([epoch], [average], "o", color=shade, markersize=5)
            label: Any = {"va": side, "color": shade, "fontweight": "bold", "textcoords": "offset points"}
            axes.annotate(f"{average:.2f}", (epoch, average), (7, 0), **label)
    return svg(figure, f"{title}: {together[0].split} accuracy by epoch", ", ".join(ends))
