"""Confused classes of the teacher and of the students without and with distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from kdpipe.pipeline.report.formatting import count
from kdpipe.pipeline.report.html.heat import HeatMap, heat_map, legend
from kdpipe.pipeline.report.html.read import Network, PageRun
from kdpipe.pipeline.report.html.templating import LeftOutError
from kdpipe.pipeline.report.tables import Table

MAX_DRAWN = 20
"""Classes up to which confusion matrices are drawn: larger ones are mostly empty."""

NUM_FIRST, MAX_LISTED = 12, 200
"""Pairs in the first table, and in all."""


@dataclass(frozen=True)
class Confusions:
    """Misclassified test images by (label, prediction), mean over a network's seeds."""

    name: str
    pairs: Mapping[tuple[int, int], float]


def confusions_of(network: Network) -> Confusions | None:
    """Return the confusions of a network; None if they were not recorded."""
    recorded = [job.examined["confusions"] for job in network.done if job.examined and "confusions" in job.examined]
    pairs: dict[tuple[int, int], float] = {}
    for label, answer, number in chain.from_iterable(recorded):
        pairs[int(label), int(answer)] = pairs.get((int(label), int(answer)), 0.0) + int(number) / len(recorded)
    return Confusions(network.name, pairs) if recorded else None


def confusions(run: PageRun) -> dict[str, object]:
    """Return the confusion matrices and the most frequent pairs.

    Raises:
        LeftOutError: If no confusions were recorded.
    """
    found = [one for network in run.main if (one := confusions_of(network)) is not None]
    names = next(([one.name for one in row.per_class] for row in run.report.rows if row.per_class), [])
    if not found or not names:
        raise LeftOutError("Confusions are recorded when a network is finished: none of this run has them yet.")
    cells = [
        [names[label], names[answer], *(count(one.pairs.get((label, answer), 0)) for one in found)]
        for label, answer in _most_frequent(found)
    ]
    headers = ["true class", "predicted class", *(one.name for one in found)]
    tables = [
        Table("Most frequent confusions, in test images, mean over seeds", headers, rows, num_names=2)
        for rows in (cells[:NUM_FIRST], cells[NUM_FIRST:])
        if rows
    ]
    bounds = (0.0, max(max(one.pairs.values(), default=0.0) for one in found))
    return {
        "pairs": tables[0] if tables else None,
        "more": tables[1] if len(tables) > 1 else None,
        "maps": [_matrix(one, names, bounds) for one in found] if len(names) <= MAX_DRAWN else [],
        "legend": legend(bounds, count),
    }


def _most_frequent(found: Sequence[Confusions]) -> list[tuple[int, int]]:
    """Return the pairs by their sum over networks, the most frequent first."""
    sums: dict[tuple[int, int], float] = {}
    for pair, number in chain.from_iterable(one.pairs.items() for one in found):
        sums[pair] = sums.get(pair, 0.0) + number
    return sorted(sums, key=lambda pair: (-round(sums[pair], 9), pair))[:MAX_LISTED]


def _matrix(one: Confusions, names: Sequence[str], bounds: tuple[float, float]) -> HeatMap:
    values = np.zeros((len(names), len(names)))
    np.fill_diagonal(values, np.nan)
    for pair, number in one.pairs.items():
        values[pair] = number
    caption = f"{one.name}: {sum(one.pairs.values()):.1f} misclassified"
    return heat_map(caption, values, names, count, bounds)
