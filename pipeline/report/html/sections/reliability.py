"""Reliability diagrams: of the answers of which a network is so and so sure, how many are right; and how sure it is.

Guo et al. 2017, arXiv 1706.04599. A network that knows how much it knows follows the diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.page.chart import SMALL, Frame, stroke, svg, words
from pipeline.page.markup import Html, LeftOutError, details, element, figure, join, safe, short, table, tables
from pipeline.page.read import Network, PageRun
from pipeline.report.examined import with_spread

FRAME = Frame(width=260, height=286, left=38, top=30, right=246, bottom=200)

HELD_TOP, HELD_BOTTOM = 212, 254
"""Where the histogram stands, below."""

FEW = 10
"""Of fewer answers, the share of right ones says little."""


@dataclass(frozen=True)
class Bin:
    """Samples of all seeds whose confidence lies in [low, high]."""

    low: float
    high: float
    num_samples: int
    confidence: float
    accuracy: float


def pooled_bins(network: Network) -> list[Bin]:
    """The bins of a network, the samples of all its seeds together; none where nothing is known of them."""
    held = [found for job in network.done if job.examined and (found := job.examined.get("bins"))]
    if not held:
        return []
    bins = []
    for at, over_seeds in enumerate(zip(*held, strict=True)):
        filled = [one for one in over_seeds if one["num_samples"]]
        count = sum(int(one["num_samples"]) for one in filled)
        confidence, accuracy = (
            sum(one["num_samples"] * float(one[name]) for one in filled) / count if count else 0.0
            for name in ("confidence", "accuracy")
        )
        bins.append(Bin(at / len(held[0]), (at + 1) / len(held[0]), count, confidence, accuracy))
    return bins


def reliability(run: PageRun) -> Html:
    """The section: teacher, students and the last compressed one; other compressed ones are folded away."""
    found = [(one, bins) for one in run.networks if (bins := pooled_bins(one))]
    if not found:
        raise LeftOutError("How sure the networks are was not kept by the kdpipe that made this run.")
    taught = [one for one, _ in found if one not in run.main and "hard labels" not in one.name]
    shown = [*run.main, *taught[-1:]]
    first = [diagram(run, one, bins) for one, bins in found if one in shown]
    others = [diagram(run, one, bins) for one, bins in found if one not in shown]
    caption = (
        "Bars: the share of right answers among those of about this confidence, pale where they are fewer than "
        f"{FEW}; dashed: what it should be. The red outline is what is missing, or too much. Below: how many answers "
        "have this confidence, on a log scale. Seeds are pooled. ECE: the gaps' mean, weighted by the answers."
    )
    more = details("The other networks", element("div", *others, kind="panels four")) if others else ""
    numbers = details("These diagrams as tables", tables(_table(one, bins) for one, bins in found))
    return join([figure(caption, *first, kind="panels four"), more, numbers])


def diagram(run: PageRun, network: Network, bins: Sequence[Bin]) -> Html:
    row = run.row(network.kind)
    error = "" if row is None or row.ece_mean is None else f"ECE {with_spread(row.ece_mean, row.ece_std)} %"
    parts = [
        words(4, 16, short(network.name, 19), size=12),
        words(FRAME.width - 2, 16, error, anchor="end", kind="tick"),
    ]
    parts += [*_scales(), Html(f'<g class="{network.colour}">')]
    largest = max(one.num_samples for one in bins)
    for one in bins:
        if one.num_samples:
            parts.append(_bars(one, math.log1p(one.num_samples) / math.log1p(largest)))
    parts += [Html("</g>"), stroke("ideal", [(_x(0), _y(0)), (_x(1), _y(1))])]
    return svg(FRAME, f"{network.name}: confidence and accuracy", error, parts)


def _x(share: float) -> float:
    return FRAME.left + share * (FRAME.right - FRAME.left)


def _y(share: float) -> float:
    return FRAME.bottom - share * (FRAME.bottom - FRAME.top)


def _scales() -> list[Html]:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(Html(f'<path class="grid" d="M{FRAME.left} {_y(share):.1f}H{FRAME.right}"/>'))
        parts.append(words(FRAME.left - 5, _y(share) + 4, f"{100 * share:.0f}", anchor="end", kind="tick"))
        parts.append(words(_x(share), HELD_BOTTOM + 14, f"{100 * share:.0f}", anchor="middle", kind="tick"))
    parts.append(words((FRAME.left + FRAME.right) / 2, HELD_BOTTOM + 29, "confidence, %", anchor="middle", kind="tick"))
    middle = (FRAME.top + FRAME.bottom) / 2
    parts.append(
        Html(
            f'<text class="tick" font-size="{SMALL}" text-anchor="middle"'
            f' transform="translate(11 {middle:g}) rotate(-90)">right, %</text>'
        )
    )
    return parts


def _bars(one: Bin, filled: float) -> Html:
    """The bin's accuracy, its gap to its confidence, and below how many samples it holds."""
    left, width = _x(one.low) + 1, _x(one.high) - _x(one.low) - 2
    sure = f"{one.num_samples:,} answers, {100 * one.confidence:.1f} % sure on average"
    tip = f"{sure}: {100 * one.accuracy:.1f} % are right"
    high, low = sorted((_y(one.accuracy), _y(one.confidence)))
    few = ' class="few"' if one.num_samples < FEW else ""
    height = filled * (HELD_BOTTOM - HELD_TOP)
    across = f'x="{left:.1f}" width="{width:.1f}"'
    return Html(
        f"<g{few}><title>{safe(tip)}</title>"
        f'<rect class="fill" {across} y="{_y(one.accuracy):.1f}" height="{FRAME.bottom - _y(one.accuracy):.1f}"/>'
        f'<rect class="gap" {across} y="{high:.1f}" height="{low - high:.1f}"/>'
        f'<rect class="held" {across} y="{HELD_BOTTOM - height:.1f}" height="{height:.1f}"/></g>'
    )


def _table(network: Network, bins: Sequence[Bin]) -> Html:
    cells = (
        [
            f"{100 * one.low:.1f} to {100 * one.high:.1f}",
            f"{one.num_samples:,}",
            f"{100 * one.confidence:.2f}",
            f"{100 * one.accuracy:.2f}",
        ]
        for one in bins
        if one.num_samples
    )
    return table(f"{network.name}: by confidence", ["confidence %", "answers", "mean confidence %", "right %"], cells)
