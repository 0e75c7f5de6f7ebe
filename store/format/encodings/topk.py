"""Top-k logits: the k largest values of a row, their classes, and the mass of the rest at any temperature.

For the rest, a row stores its log-odds against the kept classes over a grid of temperatures,

    tail[j] = logsumexp(rest / T_j) - logsumexp(kept / T_j).

Sigmoid(tail) is the mass of the rest: it does not change when a row is shifted or its kept values are rounded, and
half precision is finest where the mass is near one half. Between the grid's temperatures it is interpolated by a cubic
spline in log T, a fixed linear combination of the stored columns (`interpolation`), so that any reader computes it with
one matrix product.

A row is its values, its tail and its classes, packed, in one run of bytes, so that one gather reads it. Older stores
have an array of each, which are read and continued as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.errors import StoreError
from kdpipe.store.format.encodings.packed_classes import num_bits, num_bytes, pack_classes, unpack_classes
from kdpipe.store.format.encodings.quantized import PACKED
from kdpipe.store.format.layout import ArraySpec

VALUES, INDICES, TAIL = "logits/values", "logits/indices", "logits/tail"
"""The parts of a row, and the arrays that older stores have in place of `logits/packed`."""

TAIL_DTYPE = "float16"

MIN_LOG_ODDS = -32.0
"""Lower bound of the stored log-odds: e^-32 (1e-14) affects no figure, and keeps the spline smooth."""

MAX_CLASSES = 2**31
MAX_TEMPERATURES = 64
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 1000.0
MIN_RATIO = 1.001
"""Minimum ratio of neighboring temperatures: a denser grid makes the spline ill-conditioned."""

GRID_RATIO = 1.206
"""Maximum ratio of neighboring temperatures in a default grid. The mass of the rest is then right to 3e-4 for rows of
Gaussian, peaked, flat and trained networks, and to 1e-3 for the worst rows of 1,000 classes found: two sharp levels.
"""

BLOCK_VALUES = 2**18
"""Logits per block of rows in encoding: a block stays in the CPU cache."""


@dataclass(frozen=True)
class TopK:
    """Layout of top-k logits: `k` of `num_classes` kept, the rest over `temperatures` (ascending).

    `dtype` is the type of the kept logits in packed rows; None for the three arrays of an older store.

    Raises:
        TypeError, ValueError: A value is invalid.
    """

    name: ClassVar[str] = "top-k"
    all_logits: ClassVar[bool] = False

    num_classes: int
    k: int
    temperatures: tuple[float, ...]
    dtype: str | None = "float16"

    def __post_init__(self) -> None:
        if type(self.num_classes) is not int or type(self.k) is not int:
            raise TypeError(f"num_classes and k are {self.num_classes!r} and {self.k!r}, not whole numbers")
        if not 1 <= self.k < self.num_classes <= MAX_CLASSES:
            raise ValueError(f"k is {self.k} of {self.num_classes} classes: it must be from 1 to one less than these")
        if self.dtype not in (None, "float16", "float32"):
            raise ValueError(f"the kept logits are {self.dtype!r:.40}")
        _check_grid(self.temperatures)

    @property
    def bits(self) -> int:
        """Bits of a class in a packed row."""
        return num_bits(self.num_classes)

    @property
    def ends(self) -> tuple[int, int]:
        """The bytes of a packed row before its tail, and before its classes."""
        values = self.k * np.dtype(self.dtype).itemsize
        return values, values + 2 * len(self.temperatures)

    def to_json(self) -> dict[str, Any]:
        record = {"num_classes": self.num_classes, "k": self.k, "temperatures": list(self.temperatures)}
        return record | ({"dtype": self.dtype} if self.dtype else {})

    @staticmethod
    def from_json(record: Any) -> TopK:
        """Parse the result of `to_json`. Raises TypeError, ValueError or KeyError on anything else."""
        if not isinstance(record, Mapping) or not isinstance(record["temperatures"], list):
            raise TypeError("top-k logits are not described by a JSON object with a list of temperatures")
        return TopK(record["num_classes"], record["k"], tuple(record["temperatures"]), record.get("dtype"))

    def arrays(self, dtype: str) -> tuple[ArraySpec, ...]:
        """Return the arrays of a store with such logits; `dtype` is that of the values of an older store."""
        if self.dtype is not None:
            return (ArraySpec(PACKED, (self.ends[1] + num_bytes(self.k, self.bits),), "uint8"),)
        return (
            ArraySpec(VALUES, (self.k,), dtype),
            ArraySpec(INDICES, (self.k,), index_dtype(self.num_classes)),
            ArraySpec(TAIL, (len(self.temperatures),), TAIL_DTYPE),
        )

    def describe(self) -> str:
        grid = self.temperatures
        return f"the {self.k} largest of {self.num_classes}, for T from {grid[0]:g} to {grid[-1]:g}"

    def encode(
        self, logits: NDArray[np.float32], dtype: str, sample_ids: NDArray[np.int64], view: int
    ) -> dict[str, NDArray[Any]]:
        """Encode rows as `encode_topk` does, whatever their samples and view."""
        return self.pack(encode_topk(logits, self, self.dtype or dtype))

    def pack(self, parts: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the store's arrays of values, in their type, classes and tails [n, ...]."""
        if self.dtype is None:
            return dict(parts)
        halves = [np.ascontiguousarray(parts[name]).view(np.uint8) for name in (VALUES, TAIL)]
        return {PACKED: np.concatenate([*halves, pack_classes(parts[INDICES], self.bits)], axis=1)}

    def unpack(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the values [n, k], classes [n, k] and tails [n, G] of rows of the store's arrays."""
        if self.dtype is None:
            return {name: arrays[name] for name in (VALUES, INDICES, TAIL)}
        values, tail, classes = np.split(arrays[PACKED], self.ends, axis=1)
        return {
            VALUES: np.ascontiguousarray(values).view(np.dtype(self.dtype).newbyteorder("<")),
            INDICES: unpack_classes(classes, self.k, self.bits),
            TAIL: np.ascontiguousarray(tail).view("<f2"),
        }

    def decode(self, arrays: Mapping[str, NDArray[Any]], temperature: float) -> NDArray[np.float32]:
        """Return logits [n, C] for a softmax at `temperature`, as `dense_logits` does."""
        parts = self.unpack(arrays)
        return dense_logits(parts[VALUES], parts[INDICES], parts[TAIL], self, temperature)

    def require_temperature(self, temperature: float) -> None:
        """Raise StoreError where the temperature is outside of the grid."""
        interpolation(self, temperature)


def _check_grid(temperatures: tuple[float, ...]) -> None:
    if not all(type(value) in (int, float) for value in temperatures):
        raise TypeError(f"the temperatures are {temperatures!r:.200}, not numbers")
    if not 1 <= len(temperatures) <= MAX_TEMPERATURES:
        raise ValueError(f"there are {len(temperatures)} temperatures: 1 to {MAX_TEMPERATURES} are allowed")
    if not all(MIN_TEMPERATURE <= value <= MAX_TEMPERATURE for value in temperatures):
        raise ValueError(f"the temperatures must be from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}")
    if not all(high >= low * MIN_RATIO for low, high in pairwise(temperatures)):
        raise ValueError(f"the temperatures must ascend, each at least {MIN_RATIO} times the one before")


def index_dtype(num_classes: int) -> str:
    """Return the narrowest unsigned dtype for every class index plus a fill value above them."""
    return next(name for name in ("uint8", "uint16", "uint32") if np.iinfo(name).max >= num_classes)


def default_temperatures(lowest: float = 1.0, highest: float = 20.0) -> tuple[float, ...]:
    """Return a grid from `lowest` to `highest`: 18 temperatures (36 bytes per row) for 1 to 20.

    It consists of both ends and the midpoints of equal steps in log T: the spline is least accurate in its outer
    intervals, and half a step there makes its largest error nearly three times smaller.
    """
    if lowest == highest:
        return (lowest,)
    steps = math.ceil(math.log(highest / lowest) / math.log(GRID_RATIO))
    middles = [lowest * (highest / lowest) ** ((step + 0.5) / steps) for step in range(steps)]
    return (lowest, *(float(f"{middle:.5g}") for middle in middles), highest)


def encode_topk(logits: NDArray[np.float32], top_k: TopK, dtype: str) -> dict[str, NDArray[Any]]:
    """Encode rows [n, C] as top-k logits, by array name: values [n, k] descending, indices [n, k], tail [n, G].

    Equal logits are ordered by class, and the lower class is kept. -inf among the rest is a class without mass. Raises
    StoreError, listing rows, where a kept logit is not finite in `dtype`, or a row has NaN.
    """
    if logits.ndim != 2 or logits.shape[1] != top_k.num_classes:
        raise StoreError(f"logits have shape {list(logits.shape)}, wanted [rows, {top_k.num_classes}].")
    arrays: dict[str, NDArray[Any]] = {
        VALUES: np.empty((len(logits), top_k.k), dtype),
        INDICES: np.empty((len(logits), top_k.k), index_dtype(top_k.num_classes)),
        TAIL: np.empty((len(logits), len(top_k.temperatures)), TAIL_DTYPE),
    }
    num_rows = max(1, BLOCK_VALUES // top_k.num_classes)
    for start in range(0, len(logits), num_rows):
        block, rows = logits[start : start + num_rows], slice(start, start + num_rows)
        indices = _largest(block, top_k.k)
        kept = np.take_along_axis(block, indices, axis=1)
        with np.errstate(over="ignore", invalid="ignore"):  # overflow is reported below, by row
            arrays[VALUES][rows], arrays[INDICES][rows] = kept, indices
            arrays[TAIL][rows] = _log_odds(block, kept, indices, top_k.temperatures)
    _require_finite(arrays, dtype)
    return arrays


def _largest(logits: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Return the classes [n, k] of the k largest logits [n, C], the largest first, equal ones ordered by class."""
    kept = np.argpartition(logits, -k, axis=1)[:, -k:]
    smallest = np.take_along_axis(logits, kept, axis=1).min(axis=1, keepdims=True)
    # argpartition keeps any of those tied for the last place: sort such rows in full
    tied = np.count_nonzero(logits >= smallest, axis=1) > k
    kept[tied] = np.argsort(-logits[tied], axis=1, kind="stable")[:, :k]
    kept.sort(axis=1)
    order = np.argsort(-np.take_along_axis(logits, kept, axis=1), axis=1, kind="stable")
    return np.take_along_axis(kept, order, axis=1)


def _log_odds(
    logits: NDArray[np.float32], kept: NDArray[np.float32], indices: NDArray[np.intp], temperatures: tuple[float, ...]
) -> NDArray[np.float32]:
    rest = np.array(logits, np.float32)
    np.put_along_axis(rest, indices, -np.inf, axis=1)
    top, rest_top = kept[:, :1], np.maximum(rest.max(axis=1, keepdims=True), np.finfo(np.float32).min)
    kept, rest = kept - top, rest - rest_top  # now every exponential is at most 1, and every sum at least 1
    columns = [
        (rest_top - top)[:, 0] / np.float32(temperature) + _log_sum(rest, temperature) - _log_sum(kept, temperature)
        for temperature in temperatures
    ]
    return np.asarray(np.maximum(np.stack(columns, axis=1), np.float32(MIN_LOG_ODDS)))


def _log_sum(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    scaled = logits * np.float32(1.0 / temperature)
    with np.errstate(divide="ignore"):  # a rest of -inf exclusive_store has no mass: log 0
        return np.asarray(np.log(np.exp(scaled, out=scaled).sum(axis=1)), np.float32)


def _require_finite(arrays: Mapping[str, NDArray[Any]], dtype: str) -> None:
    bad = ~(np.isfinite(arrays[VALUES]).all(axis=1) & np.isfinite(arrays[TAIL]).all(axis=1))
    if bad.any():
        rows = np.flatnonzero(bad)
        raise StoreError(
            f"the logits of {len(rows)} of {len(bad)} rows are not finite, or too large for {dtype}, for example rows "
            f"{rows[:5].tolist()}: fix the teacher, or store float32."
        )


def interpolation(top_k: TopK, temperature: float) -> NDArray[np.float64]:
    """Return weights [G] such that `tail @ weights` are the log-odds of the rest at `temperature`.

    They are the cubic spline in log T through the grid (not-a-knot ends, de Boor 1978; with fewer than four
    temperatures, the polynomial through them). Raises StoreError outside of the grid.
    """
    grid = top_k.temperatures
    if not grid[0] <= temperature <= grid[-1]:
        raise StoreError(
            f"these top-k logits cover temperatures from {grid[0]:g} to {grid[-1]:g}, not {temperature:g}: "
            "choose one in this range, or store dense logits."
        )
    if temperature in grid:
        return np.asarray(np.eye(1, len(grid), grid.index(temperature))[0])
    nodes = np.log(np.array(grid) / grid[0]) / math.log(grid[-1] / grid[0])
    x = np.array([math.log(temperature / grid[0]) / math.log(grid[-1] / grid[0])])
    return np.asarray(np.linalg.solve(_spline_basis(nodes, nodes).T, _spline_basis(x, nodes)[0]))


def _spline_basis(x: NDArray[np.float64], nodes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1, x, x^2, x^3 and (x - node)^3 from each inner node on but the first and the last: [points, G]."""
    powers = x[:, None] ** np.arange(min(4, len(nodes)))
    return np.hstack([powers, np.maximum(x[:, None] - nodes[2:-2], 0.0) ** 3])


def tail_log_odds(tail: NDArray[Any], top_k: TopK, temperature: float) -> NDArray[np.float32]:
    """Return log(mass of the rest / mass of the kept) [n] at a temperature, from a stored tail [n, G]."""
    return np.asarray(tail.astype(np.float32) @ interpolation(top_k, temperature).astype(np.float32))


def tail_log_sum_exp(values: NDArray[Any], tail: NDArray[Any], top_k: TopK, temperature: float) -> NDArray[np.float32]:
    """Return logsumexp(rest / temperature) [n], from stored values [n, k] and tail [n, G]."""
    kept = values.astype(np.float32)
    largest = kept[:, :1]
    kept_log_sum_exp = largest[:, 0] / np.float32(temperature) + _log_sum(kept - largest, temperature)
    return kept_log_sum_exp + tail_log_odds(tail, top_k, temperature)


def dense_logits(
    values: NDArray[Any], indices: NDArray[Any], tail: NDArray[Any], top_k: TopK, temperature: float
) -> NDArray[np.float32]:
    """Return logits [n, C] whose softmax at `temperature` has the right kept classes and mass of the rest.

    All classes that are not kept share one logit. Raises StoreError where the temperature is outside the grid, or an
    index is not a class.
    """
    if indices.size and int(indices.max()) >= top_k.num_classes:
        raise StoreError(
            f"the top-k logits hold class {indices.max()}, the store has {top_k.num_classes}: it is damaged."
        )
    num_rest = top_k.num_classes - top_k.k
    rest = temperature * (tail_log_sum_exp(values, tail, top_k, temperature) - math.log(num_rest))
    dense = np.repeat(rest.astype(np.float32)[:, None], top_k.num_classes, axis=1)
    np.put_along_axis(dense, indices.astype(np.intp), values.astype(np.float32), axis=1)
    return dense
