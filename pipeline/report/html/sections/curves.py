"""Learning curves: the main metric by epoch, one panel per network, those of a kind on equal axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from kdpipe.pipeline.report.chart import (
    add_axes,
    color,
    drawing,
    epoch_axis,
    error_axis,
    new_figure,
    spread,
    svg,
    thinned,
)
from kdpipe.pipeline.report.formatting import mean_std, shortened
from kdpipe.pipeline.report.html.read import Network, PageRun
from kdpipe.pipeline.report.html.templating import LeftOutError
from kdpipe.pipeline.report.rows import mean_and_std

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, TOP, BOTTOM = 340, 236, 30, 40

LABEL = 13
"""Height of a line of text."""

MAX_WITH_SEEDS = 3
"""Curves in one panel up to which their seeds are drawn too."""


@dataclass(frozen=True)
class Curve:
    """A network's accuracies in percent by epoch, a mapping per seed. measured: What they are, and on which split."""

    name: str
    color: str
    line: str
    seeds: Sequence[Mapping[int, float]]
    measured: str = "test accuracy"

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
        Curve(network.name, network.style.color, network.style.line, seeds, trained[0].epochs[0].measured)
        for network in networks
        if (trained := [job for job in network.jobs if job.epochs])
        and (seeds := [{epoch.number: epoch.accuracy for epoch in job.epochs} for job in trained])
    ]


def legend(curves: Iterable[Curve]) -> list[tuple[str, str, str]]:
    """Return name, color and line style of each look of a curve."""
    return list({(curve.color, curve.line): (curve.name, curve.color, curve.line) for curve in curves}.values())


def learning_curves(run: PageRun) -> dict[str, object]:
    """Return the charts of a run: its trainings, its cohort, and fine-tuning after pruning and quantization.

    Raises:
        LeftOutError: If no epoch is recorded.
    """
    compressed = [network for network in run.networks if network not in run.main]
    groups = [
        (title, [curve_panel(curve.name, [curve], curves, show_others=True) for curve in curves], legend(curves))
        for title, networks in (
            ("", run.main),
            ("Students that teach each other", run.cohort),
            ("Fine-tuning of the compressed students", compressed),
        )
        if (curves := curves_of(networks))
    ]
    if not groups:
        raise LeftOutError("No training epoch is recorded in this run yet.")
    return {"groups": groups}


@drawing()
def curve_panel(title: str, strong: Sequence[Curve], together: Sequence[Curve], *, show_others: bool = False) -> Markup:
    """Draw the seeds and means of `strong` curves on axes with room for all `together`, and these faintly if asked."""
    figure = new_figure(WIDTH, HEIGHT)
    axes = add_axes(figure, 40, TOP, WIDTH - 50, HEIGHT - BOTTOM)
    axes.set_title(f"{shortened(title, 30)}: {together[0].measured}, %", loc="left", fontsize=12)
    seeds = [seed for curve in together for seed in curve.seeds]
    epoch_axis(axes, max(max(seed) for seed in seeds))
    error_axis(axes, [accuracy for seed in seeds for accuracy in seed.values()])
    for curve in (other for other in together if show_others and other not in strong):
        axes.plot(*thinned(curve.mean), "--", color=color("quiet"), linewidth=1.2, alpha=0.45)
    for curve in strong:
        shade = color(curve.color)
        for seed in curve.seeds if len(strong) <= MAX_WITH_SEEDS else ():
            axes.plot(*thinned(seed), color=shade, linewidth=0.8, alpha=0.5)
        axes.plot(*thinned(curve.mean), color=shade, linestyle=curve.line, linewidth=2.4)
    finished = [curve for curve in strong if curve.mean]
    _label_ends(axes, finished)
    ends = ", ".join(f"{curve.name} ends at {mean_std(*curve.last)} %" for curve in finished)
    return svg(figure, f"{title}: {together[0].measured} by epoch", ends)


def _label_ends(axes: Axes, curves: Sequence[Curve]) -> None:
    """Mark the last values of the curves, and write them beside a single one, or right of the panel, moved apart.

    Of more curves than there is room for they are not written.
    """
    ends = [(max(curve.mean), curve.last[0] or 0.0) for curve in curves]
    shares = [(axes.transData + axes.transAxes.inverted()).transform(end)[1] for end in ends]
    height = HEIGHT - TOP - BOTTOM
    places = spread([height * (1 - share) for share in shares], LABEL, height)
    for curve, end, place in zip(curves, ends, places, strict=True):
        shade = color(curve.color)
        axes.plot(*end, "o", color=shade, markersize=5)
        if len(curves) * LABEL > height:
            continue
        x = end[0] if len(curves) == 1 else axes.get_xlim()[1]
        at: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{end[1]:.2f}", (x, 1 - place / height), (7, 0), color=shade, fontweight="bold", **at)
