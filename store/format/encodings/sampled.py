"""Sampled labels: a few classes of a row, with weights whose mean over the views is the teacher's softmax at T = 1.

Anshumann et al. 2025 (ACL, arXiv 2503.16870) draw N classes with replacement. Here k different classes are drawn by
threshold sampling (VarOpt, Cohen et al. 2009, arXiv 0803.0473), whose variance is the smallest of k classes: with the
threshold t for which the sum of min(1, p / t) over the classes is k, each class with p > t is kept with its p, and
the others with probability p / t and the weight t. The weights of a row sum to 1.

A row is the logarithms of the weights in half precision, and then the classes, ascending, of just as many bits as the
last class has: one run of bytes, as of quantized logits.

A loss that is linear in the teacher's probabilities, such as KD at T = 1, has the same mean gradient as with all of
them. A row of top-k logits, whose rest is spread evenly, has not; but a single row of it is nearer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.errors import StoreError
from kdpipe.store.format.encodings.packed_classes import num_bits, num_bytes, pack_classes, unpack_classes
from kdpipe.store.format.encodings.quantized import PACKED
from kdpipe.store.format.encodings.topk import BLOCK_VALUES, MAX_CLASSES
from kdpipe.store.format.layout import ArraySpec
from kdpipe.store.format.samples import SPLITMIX_INCREMENT, splitmix64

ABSENT = -1e4
"""The logit of a class that was not drawn: probability 0 at T = 1."""

MIN_MASS = 1e-280
"""Stands for the threshold of a row with less than k classes of any mass."""


@dataclass(frozen=True)
class Sampled:
    """Layout of sampled labels: `k` of `num_classes`, drawn by `seed`.

    Raises:
        TypeError, ValueError: A value is invalid.
    """

    name: ClassVar[str] = "sampled"
    all_logits: ClassVar[bool] = False

    num_classes: int
    k: int
    seed: int

    def __post_init__(self) -> None:
        if not all(type(value) is int for value in (self.num_classes, self.k, self.seed)):
            raise TypeError(f"num_classes, k and seed are {self.to_json()!r:.200}, not whole numbers")
        if not 1 <= self.k < self.num_classes <= MAX_CLASSES:
            raise ValueError(f"k is {self.k} of {self.num_classes} classes: it must be from 1 to one less than these")

    @property
    def bits(self) -> int:
        """Bits of a class."""
        return num_bits(self.num_classes)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "num_classes": self.num_classes, "k": self.k, "seed": self.seed}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Sampled:
        """Parse the result of `to_json`. Raises TypeError, ValueError or KeyError on anything else."""
        return Sampled(record["num_classes"], record["k"], record["seed"])

    def arrays(self, dtype: str) -> tuple[ArraySpec, ...]:
        """Return the arrays of a store with such labels, whatever the `dtype` of its features."""
        return (ArraySpec(PACKED, (2 * self.k + num_bytes(self.k, self.bits),), "uint8"),)

    def describe(self) -> str:
        return f"{self.k} of {self.num_classes} classes sampled, for T = 1"

    def encode(
        self, logits: NDArray[np.float32], dtype: str, sample_ids: NDArray[np.int64], view: int
    ) -> dict[str, NDArray[Any]]:
        """Draw the classes of rows [n, C], by array name: uint8 [n, bytes].

        A row's classes depend on its logits, the seed, the sample's id and the view alone. Raises StoreError, listing
        rows, where a row is not finite.
        """
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(bad):
            raise StoreError(f"the logits of {len(bad)} rows are not finite, for example rows {bad[:5].tolist()}.")
        packed = np.empty((len(logits), *self.arrays(dtype)[0].row_shape), np.uint8)
        uniform, step = self._uniform(sample_ids, view), max(1, BLOCK_VALUES // self.num_classes)
        for start in range(0, len(logits), step):
            rows = slice(start, start + step)
            indices, weights = draw(probabilities(logits[rows]), self.k, uniform[rows])
            packed[rows, : 2 * self.k] = np.log(weights).astype("<f2").view(np.uint8)
            packed[rows, 2 * self.k :] = pack_classes(indices, self.bits)
        return {PACKED: packed}

    def unpack(self, packed: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the logarithms of the weights and the classes, [n, k], of rows."""
        values = np.ascontiguousarray(packed[:, : 2 * self.k]).view("<f2").astype(np.float32)
        return values, unpack_classes(packed[:, 2 * self.k :], self.k, self.bits)

    def _uniform(self, sample_ids: NDArray[np.int64], view: int) -> NDArray[np.float64]:
        """Return a number in [0, 1) for each sample: of SplitMix64 over id, seed and view."""
        with np.errstate(over="ignore"):
            keys = splitmix64(sample_ids.astype(np.uint64) + np.uint64(SPLITMIX_INCREMENT))
            keys = splitmix64(keys ^ np.uint64(self.seed % 2**64))
            keys = splitmix64(keys + np.uint64((view + 1) * SPLITMIX_INCREMENT % 2**64))
        return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def decode(self, arrays: Mapping[str, NDArray[Any]], temperature: float = 1.0) -> NDArray[np.float32]:
        """Return logits [n, C] whose softmax at T = 1 has the weights. Raises StoreError for another temperature."""
        self.require_temperature(temperature)
        values, indices = self.unpack(arrays[PACKED])
        if indices.size and int(indices.max()) >= self.num_classes:
            raise StoreError(f"{PACKED} holds class {indices.max()}, the store has {self.num_classes}: it is damaged.")
        dense = np.full((len(indices), self.num_classes), ABSENT, np.float32)
        np.put_along_axis(dense, indices, values, axis=1)
        return dense

    def require_temperature(self, temperature: float) -> None:
        """Raise StoreError unless the temperature is 1."""
        if temperature != 1.0:
            raise StoreError(
                f"these sampled labels are the teacher's probabilities at T = 1, not at {temperature:g}: set the "
                "temperature to 1, or store logits."
            )


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return softmax(logits) [n, C], in double precision."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def threshold(masses: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Return the t [n, 1] for which the sum of min(1, p / t) over the classes [n, C] is k."""
    descending = -np.sort(-masses, axis=1)
    rest = np.cumsum(descending[:, ::-1], axis=1)[:, ::-1][:, :k]  # from the first class on, from the second, ...
    thresholds = rest / (k - np.arange(k))
    first = (descending[:, :k] <= thresholds).argmax(axis=1)  # classes above their threshold: at the last one none is
    return np.maximum(np.take_along_axis(thresholds, first[:, None], axis=1), MIN_MASS)


def draw(
    masses: NDArray[np.float64], k: int, uniform: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Draw k classes of each row [n, C] by threshold sampling: classes [n, k], ascending, and weights [n, k].

    The classes below the threshold are drawn systematically: `uniform` [n] shifts k - (classes above) equal steps along
    the sum of their chances.
    """
    limit = threshold(masses, k)
    is_kept = masses > limit
    chances = np.where(is_kept, 0.0, masses / limit).cumsum(axis=1)
    chances *= (k - is_kept.sum(axis=1, keepdims=True)) / np.maximum(chances[:, -1:], MIN_MASS)
    is_drawn = np.diff(np.floor(chances + uniform[:, None]), axis=1, prepend=0.0) > 0
    order = np.argsort(~(is_kept | is_drawn), axis=1, kind="stable")[:, :k]
    indices = np.sort(order, axis=1)
    return indices, np.maximum(np.take_along_axis(masses, indices, axis=1), limit)
