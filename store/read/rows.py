"""Find the rows of samples by id, and cache the rows of units in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.format.layout import Unit

MAX_SPARSITY = 4
"""Ids up to this many times their number use a table; sparser ones, such as hashes, use a search: 25 us per batch."""

CACHE_BYTES = 2**30
"""Default limit of a store's cache, all arrays together."""


class RowIndex:
    """Map from sample ids, int64 [N], unique and >= 0, to `rows` int64 [N].

    An absent id maps to `missing_row`, which is out of range in every array, so that taking it is an IndexError.
    """

    def __init__(self, ids: NDArray[np.int64], rows: NDArray[np.int64], missing_row: int) -> None:
        order = np.argsort(ids)
        self._missing_row = missing_row
        self._sorted, self._rows = ids[order], rows[order]
        self._by_id_plus_1: NDArray[np.int64] | None = None
        if self._sorted[0] >= 0 and self._sorted[-1] < MAX_SPARSITY * len(ids) + 2**16:
            # `missing_row` at both ends too: there `take(mode="clip")` sends all ids outside.
            self._by_id_plus_1 = np.full(int(self._sorted[-1]) + 3, missing_row)
            self._by_id_plus_1[ids + 1] = rows

    def find(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of samples, int64 [B]; `missing_row` for absent ids."""
        if self._by_id_plus_1 is not None:
            return self._by_id_plus_1.take(ids + 1, mode="clip")
        positions = self._sorted.searchsorted(ids)
        found = self._sorted.take(positions, mode="clip") == ids
        return np.where(found, self._rows.take(positions, mode="clip"), self._missing_row)

    def absent(self, ids: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of `ids` for which `find` gave no row."""
        missing: NDArray[np.int64] = ids[rows == self._missing_row]
        return missing


class UnitCache:
    """The most recently used units, up to `max_bytes`; at least one unit is kept, whatever its size."""

    def __init__(self, read: Callable[[str, Unit], NDArray[Any]], max_bytes: int = CACHE_BYTES) -> None:
        self._read = read
        self._max_bytes = max_bytes
        self._units: OrderedDict[tuple[str, Unit], NDArray[Any]] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        return sum(rows.nbytes for rows in self._units.values())

    def rows(self, name: str, unit: Unit) -> NDArray[Any]:
        """Return the rows of a unit, [n, *row_shape]."""
        key = (name, unit)
        if key not in self._units:
            self._units[key] = self._read(name, unit)
            while len(self._units) > 1 and self.num_bytes > self._max_bytes:
                self._units.popitem(last=False)
        self._units.move_to_end(key)
        return self._units[key]
