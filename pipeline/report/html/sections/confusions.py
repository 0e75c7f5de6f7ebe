"""Confused classes of the teacher and of the students without and with distillation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from kdpipe.pipeline.report.formatting import count
from kdpipe.pipeline.report.html.heat import MAX_DRAWN, HeatMap, heat_map, legend
from kdpipe.pipeline.report.html.read import Network, PageRun
from kdpipe.pipeline.report.html.templating import LeftOutError
from kdpipe.pipeline.terminal.tables import Table

MAX_PAIRS = 20


@dataclass(frozen=True)
class Confusions:
    """Misclassified test images by (label, prediction), mean over a network's seeds."""

    name: str
    pairs: Mapping[tuple[int, int], float]


def confusions_of(network: Network) -> Confusions | None:
    """Return the confusions of a network; None if they were not recorded."""
    recorded = [job.examined["confusions"] for job in network.done if job.examined and "confusions" in job.examined]
    pairs: Counter[tuple[int, int]] = Counter()
    for label, prediction, number in chain.from_iterable(recorded):
        pairs[int(label), int(prediction)] += int(number)
    return Confusions(network.name, {pair: n / len(recorded) for pair, n in pairs.items()}) if recorded else None


def confusions(run: PageRun) -> dict[str, object]:
    """Return the confusion matrices, for up to MAX_DRAWN classes, and the most frequent pairs.

    Raises:
        LeftOutError: If no confusions were recorded.
    """
    found = [of_network for network in run.main if (of_network := confusions_of(network)) is not None]
    names = next(([by_class.name for by_class in row.per_class] for row in run.report.rows if row.per_class), [])
    if not run.is_labeled:
        raise LeftOutError("They need the classes of test images, and none has one.")
    if not found or not names:
        raise LeftOutError("Confusions are recorded when a network is finished: none of this run has them yet.")
    cells = [
        [names[label], names[prediction], *(count(network.pairs.get((label, prediction), 0)) for network in found)]
        for label, prediction in _most_frequent(found)
    ]
    headers = ["true class", "predicted class", *(network.name for network in found)]
    table = Table("Most frequent confusions, in test images, mean over seeds", headers, cells, num_names=2)
    bounds = (0.0, max(max(network.pairs.values(), default=0.0) for network in found))
    return {
        "pairs": table if cells else None,
        "maps": [_matrix(network, names, bounds) for network in found] if len(names) <= MAX_DRAWN else [],
        "legend": legend(bounds, count),
    }


def _most_frequent(found: Sequence[Confusions]) -> list[tuple[int, int]]:
    """Return the pairs by their sum over networks, the most frequent first."""
    sums: dict[tuple[int, int], float] = {}
    for pair, number in chain.from_iterable(network.pairs.items() for network in found):
        sums[pair] = sums.get(pair, 0.0) + number
    return sorted(sums, key=lambda pair: (-round(sums[pair], 9), pair))[:MAX_PAIRS]


def _matrix(network: Confusions, names: Sequence[str], bounds: tuple[float, float]) -> HeatMap:
    values = np.zeros((len(names), len(names)))
    np.fill_diagonal(values, np.nan)
    for pair, number in network.pairs.items():
        values[pair] = number
    caption = f"{network.name}: {sum(network.pairs.values()):.1f} misclassified"
    return heat_map(caption, values, names, count, bounds)
