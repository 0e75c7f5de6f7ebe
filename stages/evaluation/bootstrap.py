"""Confidence intervals of measures that are no share of the test images, by resampling the images.

The percentile bootstrap of Efron and Tibshirani 1993, chapter 13. A resampled set gives each image a count, its weight
in the measure: all sets are computed at once, from the outputs sorted once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.stages.evaluation.intervals import LEVEL
from kdpipe.stages.evaluation.knn import mutual_knn
from kdpipe.stages.evaluation.main_metric import DECISIONS, MAP, MUTUAL_KNN, MainMetric

NUM_SETS = 400
SETS_AT_ONCE = 20
"""Resampled sets computed at once: 50,000 images take 8 MB of counts."""

Array = NDArray[np.float64]
Measure = Callable[[Array], Array]
"""Returns a measure of each of S resampled sets, [S], by the counts of the images, [S, N]."""


def bootstrap_interval(metric: MainMetric, targets: Tensor, outputs: Tensor) -> tuple[float, float] | None:
    """Return the interval of a network's measure on the images, the same for the same numbers.

    Args:
        metric: mAP, R² or what takes their place.
        targets: Labels or numbers [N, K], NaN where they are not known; or the teacher's embeddings.
        outputs: The network's, [N, K].

    Returns:
        The bounds; None for fewer than two images.
    """
    num = len(targets)
    if num < 2:
        return None
    wanted, found = targets.double().numpy(), outputs.double().numpy()
    if metric in (DECISIONS, MUTUAL_KNN):
        embeddings = metric == MUTUAL_KNN
        shares = (
            mutual_knn(targets, outputs)[0].double().numpy() if embeddings else ((found > 0) == (wanted == 1)).mean(1)
        )
        num = len(shares)
        measure: Measure = lambda counts: counts @ shares / num  # noqa: E731
    else:
        of_column = _average_precision if metric == MAP else _r2
        measure = _mean([of_column(*columns) for columns in zip(wanted.T, found.T, strict=True)])
    generator, each = np.random.default_rng(0), np.full(num, 1 / num)
    values = np.concatenate(
        [
            measure(generator.multinomial(num, each, size=SETS_AT_ONCE).astype(np.float64))
            for _ in range(NUM_SETS // SETS_AT_ONCE)
        ]
    )
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def _mean(columns: list[Measure]) -> Measure:
    """Return the mean of the measures of columns, of those that are defined (not NaN); 0 if none is."""

    def measure(counts: Array) -> Array:
        values = np.stack([column(counts) for column in columns], 1)
        defined = ~np.isnan(values)
        total: Array = np.where(defined, values, 0).sum(1) / np.maximum(defined.sum(1), 1)
        return total

    return measure


def _average_precision(targets: Array, scores: Array) -> Measure:
    """Return scikit-learn's average precision of a label; NaN in sets without it."""
    known = np.flatnonzero(~np.isnan(targets))
    order = known[np.argsort(-scores[known], kind="stable")]
    is_positive, ordered = targets[order] == 1, scores[order]
    last = np.searchsorted(-ordered, -ordered, side="right") - 1  # equal scores have one threshold

    def measure(counts: Array) -> Array:
        weights = counts[:, order]
        positives = weights * is_positive
        precision = positives.cumsum(1)[:, last] / np.maximum(weights.cumsum(1)[:, last], 1)
        total = positives.sum(1)
        return np.where(total > 0, (positives * precision).sum(1) / np.maximum(total, 1), np.nan)

    return measure


def _r2(targets: Array, found: Array) -> Measure:
    """Return R² of a number; NaN in sets in which it does not vary."""
    known = np.flatnonzero(~np.isnan(targets))
    centered = targets[known] - targets[known].mean() if len(known) else targets[known]
    squares = (targets[known] - found[known]) ** 2

    def measure(counts: Array) -> Array:
        weights = counts[:, known]
        total = weights @ centered**2 - (weights @ centered) ** 2 / np.maximum(weights.sum(1), 1)
        varies = total > 1e-12 * max(float(np.square(centered).sum()), 1e-300)
        return np.where(varies, 1 - weights @ squares / np.where(varies, total, 1), np.nan)

    return measure
