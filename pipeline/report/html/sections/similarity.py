"""Classes that the teacher finds similar, from its stored outputs: heat map, pairs, and each class's neighbors.

The similarity is the mean softened probability of one class on the images of another (Hinton et al. 2015, arXiv
1503.02531, section 2). The teacher is not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.pipeline.report.formatting import percent
from kdpipe.pipeline.report.html.heat import MAX_DRAWN, heat_map, legend
from kdpipe.pipeline.report.html.read import PageRun
from kdpipe.pipeline.report.html.templating import LeftOutError
from kdpipe.pipeline.terminal.tables import Table
from kdpipe.stages.data.image_set import UNLABELED
from kdpipe.store import KdpipeError, StoreError, TargetStore, is_url, open_store

TEMPERATURE = 4.0
"""At temperature 1 a good teacher gives the other classes almost no probability."""

MAX_ROWS, MAX_OUTPUTS = 100_000, 10**8
"""Samples, and values of their outputs, that the mean is taken over, at most."""

MAX_SHARES = 10**7
"""Shares that are computed, at most: those of all classes up to 3,162."""

BATCH_ROWS, BATCH_OUTPUTS = 4096, 2**22

NUM_PAIRS, MAX_NEIGHBORS = 12, 1000

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Similarity:
    """Similarity of R of C classes to all of them.

    Attributes:
        names: The names of the C classes.
        classes: int64 [R], the compared classes, in order; all if C is not very large.
        shares: [R, C], mean softened probability of class [column] on images of the compared class [row]; a row of NaN
            for a class without images.
        source: Description of the samples.
    """

    names: tuple[str, ...]
    classes: NDArray[np.int64]
    shares: Values
    num_samples: int
    source: str

    @property
    def others(self) -> Values:
        """The shares with NaN for those of the own class."""
        without = self.shares.copy()
        without[np.arange(len(self.classes)), self.classes] = np.nan
        return without


def class_similarity(run: PageRun) -> dict[str, object]:
    """Return the heat map, for up to MAX_DRAWN classes, and tables.

    Raises:
        LeftOutError: If the teacher's stored outputs cannot be read.
    """
    try:
        found = read_similarity(run.path, run.recipe)
    except StoreError as error:
        raise LeftOutError(f"The teacher's outputs could not be read: {error}") from error
    values = found.others
    if len(found.names) < 2 or not np.isfinite(values).any():
        raise LeftOutError("Similarity needs stored outputs for at least two classes.")
    bounds = float(np.nanmin(values)), float(np.nanmax(values))
    is_drawn = len(found.names) <= MAX_DRAWN
    return {
        "temperature": f"{TEMPERATURE:g}",
        "num_samples": f"{found.num_samples:,}",
        "source": found.source,
        "left_out": f"{len(found.classes):,} of the {len(found.names):,} classes, those with the most samples"
        if len(found.classes) < len(found.names)
        else None,
        "map": heat_map("Share of the teacher's softened output", values, found.names, percent, bounds)
        if is_drawn
        else None,
        "legend": legend(bounds, percent),
        "pairs": _pairs(found),
        "neighbors": _neighbors(found),
    }


def read_similarity(run: Path, recipe: Mapping[str, Any]) -> Similarity:
    """Read the similarity from the first teacher's test store, or else the first view of its training store.

    Raises:
        StoreError: If neither can be read.
    """
    from kdpipe.stages.targets.open import test_store_path

    named = [*recipe["student"].get("stores", ()), recipe.get("cache", {}).get("store"), str(run / "store.zarr")]
    path = str(next(store for store in named if store))
    if is_url(path):
        raise StoreError("the store is remote, and a report downloads nothing.")
    try:
        return similarity_of(open_store(Path(test_store_path(path))), "the test images")
    except KdpipeError:
        store = open_store(Path(path))
    if store.manifest.identity.views.get("mix") is not None:
        raise StoreError("there is no test store, and the training store's views mix images of several classes.")
    return similarity_of(store, "the first view of the training images")


def similarity_of(store: TargetStore, source: str) -> Similarity:
    """Return the mean softened output by label.

    Raises:
        StoreError: If labels are outside of the teacher's classes, or there are no logits.
    """
    if not store.manifest.has_logits:
        raise StoreError("the teacher has embeddings, no logits.")
    if store.manifest.task != "classification":
        raise StoreError("the outputs are not of classes.")
    num_classes, labels = store.num_classes, store.samples.labels
    if (labels == UNLABELED).all():
        raise StoreError("the stored samples have no labels.")
    if labels.min() < UNLABELED or labels.max() >= num_classes:
        raise StoreError("the labels of the stored samples are not among the teacher's classes.")
    has_names = len(store.classes) == num_classes
    names = store.classes if has_names else tuple(f"class {number}" for number in range(num_classes))
    classes = _most_frequent(labels, num_classes)
    rows = np.flatnonzero(np.isin(labels, classes))[: max(1, min(MAX_ROWS, MAX_OUTPUTS // num_classes))]
    sums, num_seen = np.zeros((len(classes), num_classes)), np.zeros(len(classes))
    step = max(1, min(BATCH_ROWS, BATCH_OUTPUTS // num_classes))
    for batch in (rows[start : start + step] for start in range(0, len(rows), step)):
        probabilities = softened(store.logits(0, store.samples.ids[batch], TEMPERATURE))
        is_finite = np.isfinite(probabilities).all(1)
        compared = np.searchsorted(classes, labels[batch][is_finite])
        np.add.at(sums, compared, probabilities[is_finite])
        num_seen += np.bincount(compared, minlength=len(classes))
    with np.errstate(invalid="ignore", divide="ignore"):
        sums /= num_seen[:, None]
    return Similarity(names, classes, sums, int(num_seen.sum()), source)


def _most_frequent(labels: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Return the classes to compare, in order: as many as MAX_SHARES allows, those with the most samples."""
    num_compared = min(num_classes, max(2, MAX_SHARES // num_classes))
    counts = np.bincount(labels[labels != UNLABELED], minlength=num_classes)
    return np.sort(np.argsort(-counts, kind="stable")[:num_compared])


def softened(logits: NDArray[Any]) -> Values:
    """Return softmax(logits / TEMPERATURE), float64 [B, C]."""
    from scipy.special import softmax

    probabilities: Values = softmax(logits.astype(np.float64) / TEMPERATURE, axis=1)
    return probabilities


def closest_pairs(similarity: Similarity, max_pairs: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs of compared classes with the highest mean of both shares, closest first; ties in class order."""
    among = similarity.others[:, similarity.classes]
    mutual = np.nan_to_num(among + among.T, nan=-1.0)
    rows, columns = np.triu_indices(len(mutual), 1)
    order = np.argsort(-mutual[rows, columns], kind="stable")[:max_pairs]
    pairs = zip(rows[order].tolist(), columns[order].tolist(), strict=True)
    classes = similarity.classes
    yield from ((int(classes[row]), int(classes[column])) for row, column in pairs if mutual[row, column] >= 0)


def _pairs(found: Similarity) -> Table:
    shares = dict(zip(found.classes.tolist(), found.shares, strict=True))
    cells = [
        [found.names[a], found.names[b], percent(shares[a][b]), percent(shares[b][a])]
        for a, b in closest_pairs(found, NUM_PAIRS)
    ]
    headers = ["class A", "class B", "share of B on images of A", "share of A on images of B"]
    return Table("The most similar pairs", headers, cells, num_names=2)


def _neighbors(found: Similarity) -> Table:
    """Return for compared classes, those with the least share of their own, the three others with the largest."""
    known = np.asarray(np.isfinite(found.shares).all(axis=1))
    own = np.where(known, found.shares[np.arange(len(known)), found.classes], np.inf)
    listed = np.sort(np.argsort(own, kind="stable")[: min(known.sum(), MAX_NEIGHBORS)]).tolist()
    cells = []
    for label, shares in ((int(found.classes[number]), found.shares[number]) for number in listed):
        near = [other for other in np.argsort(-shares, kind="stable")[:4].tolist() if other != label][:3]
        cells.append(
            [found.names[label], percent(shares[label]), *(f"{found.names[i]} {percent(shares[i])}" for i in near)]
        )
    headers = ["true class", "its own share", "first", "second", "third"]
    shown = f": the {len(listed):,} classes that it knows least" if len(listed) < known.sum() else ""
    return Table(f"Most similar classes{shown}", headers, [row + ["-"] * (5 - len(row)) for row in cells])
