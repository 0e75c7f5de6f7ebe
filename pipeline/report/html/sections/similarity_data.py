"""Measure class similarity from a teacher's stored outputs.

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

from kdpipe.store import KdpipeError, StoreError, TargetStore, is_url, open_store

TEMPERATURE = 4.0
"""At temperature 1 a good teacher gives the other classes almost no probability."""

MAX_ROWS = 100_000
"""Samples that the mean is taken over, at most."""

BATCH_ROWS = 4096

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Similarity:
    """Similarity of C classes.

    Attributes:
        shares: [C, C], mean softened probability of class [column] on images of class [row]; a row of NaN for a class
            without images.
        source: Description of the samples.
    """

    names: tuple[str, ...]
    shares: Values
    num_samples: int
    source: str

    @property
    def others(self) -> Values:
        """The shares with NaN on the diagonal."""
        without = self.shares.copy()
        np.fill_diagonal(without, np.nan)
        return without


def read_similarity(run: Path, recipe: Mapping[str, Any]) -> Similarity:
    """Read the similarity from the first teacher's test store, or else the first view of its training store.

    Raises:
        StoreError: If neither can be read.
    """
    from kdpipe.stages.targets.open import test_store_path

    named = [*recipe["student"].get("stores", ()), recipe.get("cache", {}).get("store"), str(run / "store.zarr")]
    place = str(next(one for one in named if one))
    if is_url(place):
        raise StoreError("the store is remote, and a report downloads nothing.")
    try:
        return similarity_of(open_store(Path(test_store_path(place))), "the test images")
    except KdpipeError:
        store = open_store(Path(place))
    if store.manifest.identity.views.get("mix") is not None:
        raise StoreError("there is no test store, and the training store's views mix images of several classes.")
    return similarity_of(store, "the first view of the training images")


def similarity_of(store: TargetStore, source: str) -> Similarity:
    """Return the mean softened output by label.

    Raises:
        StoreError: If labels are outside of the teacher's classes.
    """
    count, labels = store.num_classes, store.samples.labels[:MAX_ROWS]
    if not len(labels) or labels.min() < 0 or labels.max() >= count:
        raise StoreError("the labels of the stored samples are not among the teacher's classes.")
    names = store.classes if len(store.classes) == count else tuple(f"class {number}" for number in range(count))
    sums, num_seen = np.zeros((count, count)), np.zeros(count)
    for start in range(0, len(labels), BATCH_ROWS):
        batch = slice(start, min(start + BATCH_ROWS, len(labels)))
        probabilities = softened(_logits(store, store.samples.ids[batch]))
        is_known = np.isfinite(probabilities).all(1)
        batch_labels = labels[batch][is_known]
        np.add.at(sums, batch_labels, probabilities[is_known])
        num_seen += np.bincount(batch_labels, minlength=count)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Similarity(names, sums / num_seen[:, None], int(num_seen.sum()), source)


def softened(logits: NDArray[Any]) -> Values:
    """Return softmax(logits / TEMPERATURE), float64 [B, C]."""
    from scipy.special import softmax

    probabilities: Values = softmax(logits.astype(np.float64) / TEMPERATURE, axis=1)
    return probabilities


def _logits(store: TargetStore, ids: NDArray[np.int64]) -> NDArray[Any]:
    """Return logits [B, C] of the first view."""
    if store.manifest.top_k is None:
        return store.gather("logits", 0, ids)
    import torch

    from kdpipe.stages.targets.outputs import TopKTargets

    read = (store.gather(f"logits/{name}", 0, ids) for name in ("values", "indices", "tail"))
    values, indices, tail = (torch.from_numpy(np.ascontiguousarray(one)) for one in read)
    logits: NDArray[Any] = TopKTargets(store.manifest.top_k, values, indices, tail, {}).logits_at(TEMPERATURE).numpy()
    return logits


def by_likeness(similarity: Similarity, max_classes: int) -> NDArray[np.int64]:
    """Return the classes that have images, ordered so that similar ones are next to each other, int64 [n].

    Of more than `max_classes`, those most similar to another are kept. Average linkage of 1 - similarity with ordered
    leaves (Bar-Joseph et al. 2001).
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    both = mutual(similarity)
    known = np.flatnonzero(np.isfinite(similarity.shares).all(1))
    closest = np.nan_to_num(both).max(1)[known]
    chosen = np.sort(known[np.argsort(-closest, kind="stable")[:max_classes]])
    if len(chosen) < 3:
        return chosen.astype(np.int64)
    near = both[np.ix_(chosen, chosen)]
    largest = float(np.nanmax(near)) or 1.0
    apart = 1 - near / largest
    np.fill_diagonal(apart, 0.0)
    tree = linkage(squareform(np.maximum(apart, 0.0), checks=False), "average", optimal_ordering=len(chosen) <= 200)
    ordered: NDArray[np.int64] = chosen[leaves_list(tree)].astype(np.int64)
    return ordered


def mutual(similarity: Similarity) -> Values:
    """Return the symmetric similarity [C, C]: the mean of both directions, NaN on the diagonal."""
    return (similarity.others + similarity.others.T) / 2


def closest_pairs(similarity: Similarity, max_pairs: int) -> Iterator[tuple[int, int]]:
    """Yield the most similar pairs of classes, the closest first; ties in class order."""
    both = np.nan_to_num(mutual(similarity), nan=-1.0)
    rows, columns = np.triu_indices(len(both), 1)
    order = np.argsort(-both[rows, columns], kind="stable")[:max_pairs]
    yield from ((int(rows[one]), int(columns[one])) for one in order if both[rows[one], columns[one]] >= 0)
