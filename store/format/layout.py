"""Layout of a store: how rows are cut into units, shards and chunks.

A unit of work is (view, shard) across all arrays: one writer computes, owns and commits it. All arrays therefore
share the rows of a unit, and each cuts its shard into inner chunks of a size that suits its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 4096
"""Shard data is a multiple of this, so that the shards of a view can be mapped contiguously."""

CHUNK_BYTES = 256 * 1024
"""Maximum size of an inner chunk: plain zarr reads a whole chunk to get one row."""

ANY_ROW_PAGES = 2048
"""This many rows fill whole pages for any array of 2-byte numbers, so that a layer added later can be mapped too."""

DTYPES = ("float16", "float32", "uint8", "uint16", "uint32")


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store, shape [V, N, *row_shape]. `name` is its path in the Zarr group.

    `own_output` marks a layer whose output the teacher overwrites in place afterwards: stores without the mark hold
    what was left of it.
    """

    name: str
    row_shape: tuple[int, ...]
    dtype: str
    own_output: bool = False

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize

    @property
    def little(self) -> np.dtype[Any]:
        """Its dtype on disk, little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def fill_value(self) -> float | int:
        """Value that plain zarr reads where nothing was written: one that no teacher gives."""
        dtype = np.dtype(self.dtype)
        return float("nan") if dtype.kind == "f" else int(np.iinfo(dtype).max)

    def to_json(self) -> dict[str, Any]:
        own_output = {"own_output": True} if self.own_output else {}
        return {"row_shape": list(self.row_shape), "dtype": self.dtype, **own_output}


@dataclass(frozen=True, order=True)
class Unit:
    """Rows [start, stop) of one view, in all arrays: committed as a whole."""

    view: int
    shard: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def key(self) -> str:
        """Its name in file names."""
        return f"v{self.view}-s{self.shard}"

    def __str__(self) -> str:
        return f"view {self.view}, shard {self.shard}"


@dataclass(frozen=True)
class StoreLayout:
    """Number of views and samples of a store, and how they are cut.

    Attributes:
        unit_rows: Rows of a full unit.
        segments: Samples of the first filling and of each extension. A segment begins with a unit of its own, so that
            growing rewrites nothing; the rows left over before it stay empty.
    """

    num_views: int
    unit_rows: int
    segments: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        return sum(self.segments)

    @property
    def segment_shards(self) -> list[int]:
        """Number of shards of each segment in a view."""
        return [-(-count // self.unit_rows) for count in self.segments]

    @property
    def num_shards(self) -> int:
        """Number of shards of one array in one view."""
        return sum(self.segment_shards)

    @property
    def num_rows(self) -> int:
        """Rows of a view, empty ones before a later segment included: N of an array [V, N, ...]."""
        return sum(self.segment_shards[:-1]) * self.unit_rows + self.segments[-1]

    def units(self, views: Iterable[int] | None = None) -> list[Unit]:
        """Return the units of some views, or of all, in order."""
        ranges = [
            (start, min(start + self.unit_rows, first + count))
            for first, count in zip(self._starts(), self.segments, strict=True)
            for start in range(first, first + count, self.unit_rows)
        ]
        return [
            Unit(view, shard, start, stop)
            for view in (range(self.num_views) if views is None else views)
            for shard, (start, stop) in enumerate(ranges)
        ]

    def segment_of(self, shard: int) -> int:
        """Return the number of the segment that contains a shard."""
        return int(np.searchsorted(np.cumsum(self.segment_shards), shard, side="right"))

    def sample_rows(self) -> NDArray[np.int64]:
        """Return the row of each sample, in the order of the samples: int64 [num_samples], ascending."""
        return np.concatenate(
            [first + np.arange(count) for first, count in zip(self._starts(), self.segments, strict=True)]
        )

    def _starts(self) -> list[int]:
        shards = self.segment_shards
        return [sum(shards[:number]) * self.unit_rows for number in range(len(shards))]


def rows_per_unit(specs: Sequence[ArraySpec], num_samples: int, shard_bytes: int) -> int:
    """Return the rows of a unit: page-aligned in every array, near `shard_bytes` in the widest.

    At most as many as `num_samples` need and, where that costs nothing, a multiple of ANY_ROW_PAGES.
    """
    aligned = math.lcm(*(PAGE_BYTES // math.gcd(spec.row_bytes, PAGE_BYTES) for spec in specs))
    limit = max(aligned, shard_bytes // max(spec.row_bytes for spec in specs))
    for step in (math.lcm(aligned, ANY_ROW_PAGES), aligned):
        if step <= limit and step <= num_samples:
            return step * min(limit // step, -(-num_samples // step))
    return aligned * min(limit // aligned, -(-num_samples // aligned))


def rows_per_chunk(spec: ArraySpec, unit_rows: int) -> int:
    """Return the largest divisor of `unit_rows` whose rows fit in CHUNK_BYTES (1 where a single row does not)."""
    limit = max(1, CHUNK_BYTES // spec.row_bytes)
    return next(rows for rows in range(min(limit, unit_rows), 0, -1) if unit_rows % rows == 0)
