"""Reliability diagrams: accuracy by confidence (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from kdpipe.pipeline.report.chart import add_axes, color, drawing, new_figure, svg
from kdpipe.pipeline.report.formatting import mean_std, shortened
from kdpipe.pipeline.report.html.read import Network, PageRun
from kdpipe.pipeline.report.html.templating import LeftOutError

MIN_SAMPLES = 10
"""Bins with fewer predictions are drawn pale."""

WIDTH, HEIGHT = 260, 302


@dataclass(frozen=True)
class Bin:
    """Test samples of all seeds with a confidence in [low, high]."""

    low: float
    high: float
    num_samples: int
    confidence: float
    accuracy: float


def pooled_bins(network: Network) -> list[Bin]:
    """Return the bins of a network with the samples of all its seeds; none if they were not recorded."""
    recorded = [found for job in network.done if job.examined and (found := job.examined.get("bins"))]
    bins = []
    for number, over_seeds in enumerate(zip(*recorded, strict=True)):
        filled = [seed for seed in over_seeds if seed["num_samples"]]
        count = sum(int(seed["num_samples"]) for seed in filled)
        confidence, accuracy = (
            sum(seed["num_samples"] * float(seed[name]) for seed in filled) / count if count else 0.0
            for name in ("confidence", "accuracy")
        )
        bins.append(Bin(number / len(recorded[0]), (number + 1) / len(recorded[0]), count, confidence, accuracy))
    return bins


def reliability(run: PageRun) -> dict[str, object]:
    """Return a diagram of each network.

    Raises:
        LeftOutError: If no bins were recorded.
    """
    found = [(network, bins) for network in run.networks if (bins := pooled_bins(network))]
    if not run.is_labeled:
        raise LeftOutError("It needs the classes of test images, and none has one.")
    if not found:
        raise LeftOutError("Confidences are recorded when a network is finished: none of this run has them yet.")
    return {"charts": [diagram(run, network, bins) for network, bins in found], "min_samples": MIN_SAMPLES}


@drawing()
def diagram(run: PageRun, network: Network, bins: Sequence[Bin]) -> Markup:
    """Draw accuracy by confidence, and below it the number of predictions."""
    row = run.row(network.kind)
    error = "" if row is None or row.ece_mean is None else f"ECE {mean_std(row.ece_mean, row.ece_std)} %"
    figure = new_figure(WIDTH, HEIGHT)
    axes, counts = (add_axes(figure, 46, top, WIDTH - 14, bottom) for top, bottom in ((46, 216), (228, 266)))
    axes.set_title(shortened(network.name, 30), loc="left", fontsize=12, pad=22)
    below: Any = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(error, (0, 1), (0, 7), fontsize=11, color=color("quiet"), **below)
    axes.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy, %", xticks=range(0, 101, 25), yticks=range(0, 101, 25))
    axes.tick_params(labelbottom=False)
    counts.set(xlim=(0, 100), ylim=(0, 1), xlabel="confidence, %", xticks=range(0, 101, 25), yticks=[])
    counts.grid(visible=False)
    largest = max(math.log1p(part.num_samples) for part in bins) or 1.0
    for part in bins:
        if not part.num_samples:
            continue
        left, width = 100 * part.low + 0.5, 100 * (part.high - part.low) - 1
        low, high = sorted((100 * part.accuracy, 100 * part.confidence))
        opacity, bar = (0.3 if part.num_samples < MIN_SAMPLES else 0.8), color(network.style.color)
        axes.bar(left, 100 * part.accuracy, width, align="edge", color=bar, alpha=opacity)
        gap = axes.bar(left, high - low, width, low, align="edge", fill=False, edgecolor=color("wrong"), alpha=opacity)
        gap[0].set(linestyle="--", linewidth=1.5)
        counts.bar(left, math.log1p(part.num_samples) / largest, width, align="edge", color=bar, alpha=0.45)
    axes.plot([0, 100], [0, 100], "--", color=color("quiet"), linewidth=1)
    return svg(figure, f"{network.name}: confidence and accuracy", error)
