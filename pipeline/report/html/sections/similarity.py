"""Classes that the teacher finds similar: heat map, most similar pairs, and each class's neighbors."""

from __future__ import annotations

import numpy as np

from kdpipe.pipeline.report.formatting import percent
from kdpipe.pipeline.report.html.heat import heat_map, legend
from kdpipe.pipeline.report.html.read import PageRun
from kdpipe.pipeline.report.html.sections.similarity_data import (
    TEMPERATURE,
    Similarity,
    by_likeness,
    closest_pairs,
    read_similarity,
)
from kdpipe.pipeline.report.html.templating import LeftOutError
from kdpipe.pipeline.report.tables import Table
from kdpipe.store import StoreError

MAX_DRAWN, MAX_UNSORTED, MAX_BESIDE = 100, 12, 30
"""Classes in the map; up to which they keep the data set's order; up to which a table fits beside the map."""


def class_similarity(run: PageRun) -> dict[str, object]:
    """Return the heat map and tables.

    Raises:
        LeftOutError: If the teacher's stored outputs cannot be read.
    """
    try:
        found = read_similarity(run.path, run.recipe)
    except StoreError as error:
        raise LeftOutError(f"The teacher's outputs could not be read: {error}") from error
    count = len(found.names)
    drawn = np.arange(count) if count <= MAX_UNSORTED else by_likeness(found, MAX_DRAWN)
    values = found.others[np.ix_(drawn, drawn)]
    if count < 2 or not np.isfinite(values).any():
        raise LeftOutError("Similarity needs stored outputs for at least two classes.")
    bounds, names = (float(np.nanmin(values)), float(np.nanmax(values))), [found.names[number] for number in drawn]
    return {
        "temperature": f"{TEMPERATURE:g}",
        "num_samples": f"{found.num_samples:,}",
        "source": found.source,
        "map": heat_map("Share of the teacher's softened output", values, names, percent, bounds),
        "legend": legend(bounds, percent),
        "is_small": len(drawn) <= MAX_BESIDE,
        "is_sorted": count > MAX_UNSORTED,
        "num_drawn": len(drawn),
        "num_classes": count,
        "pairs": _pairs(found),
        "numbers": _matrix(found) if count <= MAX_UNSORTED else _neighbors(found),
    }


def _pairs(found: Similarity) -> Table:
    cells = [
        [found.names[one], found.names[other], percent(found.shares[one, other]), percent(found.shares[other, one])]
        for one, other in closest_pairs(found, 12)
    ]
    headers = ["class A", "class B", "share of B on images of A", "share of A on images of B"]
    return Table("The most similar pairs", headers, cells, num_names=2)


def _matrix(found: Similarity) -> Table:
    cells = [[name, *map(percent, row)] for name, row in zip(found.names, found.shares, strict=True)]
    return Table("Mean softened output by true class", ["true class", *found.names], cells)


def _neighbors(found: Similarity) -> Table:
    """Return for each class the three others with the largest shares."""
    cells = []
    for number, name in enumerate(found.names):
        if np.isnan(found.shares[number]).any():
            continue
        row = found.others[number]
        near = np.argsort(-np.nan_to_num(row, nan=-1.0), kind="stable")[:3]
        shares = (f"{found.names[one]} {percent(row[one])}" for one in near)
        cells.append([name, percent(found.shares[number, number]), *shares])
    return Table("Most similar classes", ["true class", "its own share", "first", "second", "third"], cells)
