"""How rows are cut into units, shards and chunks: pure arithmetic over row sizes.

A unit of work is (view, shard) across all arrays: one writer computes it, owns it and commits it. All arrays
therefore share the rows of a unit, and each cuts its shard into inner chunks of a size that suits its rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PAGE_BYTES = 4096
"""Shard data is a multiple of this, so that the shards of a view can be mapped one behind the other."""

CHUNK_BYTES = 256 * 1024
"""What an inner chunk may hold: plain zarr reads a whole chunk to get at one row."""

DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store, shape [V, N, *row_shape]. `name` is its path in the Zarr group."""

    name: str
    row_shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, Any]:
        return {"row_shape": list(self.row_shape), "dtype": self.dtype}


@dataclass(frozen=True, order=True)
class Unit:
    """Rows [start, stop) of one view, in all arrays: the piece of work that is committed as a whole."""

    view: int
    shard: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"view {self.view}, shard {self.shard}"


def rows_per_unit(specs: Sequence[ArraySpec], num_samples: int, shard_bytes: int) -> int:
    """Rows in a unit: page-aligned in every array, near `shard_bytes` in the widest, no more than the set needs."""
    aligned = math.lcm(*(PAGE_BYTES // math.gcd(spec.row_bytes, PAGE_BYTES) for spec in specs))
    wanted = max(1, shard_bytes // (aligned * max(spec.row_bytes for spec in specs)))
    needed = math.ceil(num_samples / aligned)
    return aligned * min(wanted, needed)


def rows_per_chunk(spec: ArraySpec, unit_rows: int) -> int:
    """The largest divisor of `unit_rows` whose rows fit in CHUNK_BYTES (1 where a single row does not)."""
    most = max(1, CHUNK_BYTES // spec.row_bytes)
    return next(rows for rows in range(min(most, unit_rows), 0, -1) if unit_rows % rows == 0)


def all_units(num_views: int, num_samples: int, unit_rows: int) -> list[Unit]:
    """Every unit of a store, view by view."""
    return [
        Unit(view, shard, start, min(start + unit_rows, num_samples))
        for view in range(num_views)
        for shard, start in enumerate(range(0, num_samples, unit_rows))
    ]
