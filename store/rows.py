"""Finding the rows of samples by id: through a table where ids are dense, by bisection where they are not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TABLE_PER_SAMPLE = 8
"""A table may have so many entries a sample, 4 bytes each; ids that are hashes would need far more."""


class RowIndex:
    """From sample ids to rows. `ids` int64 [N], unique and >= 0; `rows` int64 [N], where each stands."""

    def __init__(self, ids: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        order = np.argsort(ids)
        self._ids, self._rows = ids[order], rows[order]
        largest = int(self._ids[-1])
        self._table: NDArray[np.int64] | None = None
        if largest < TABLE_PER_SAMPLE * len(ids) + 1024:
            self._table = np.full(largest + 1, -1, np.int64)
            self._table[ids] = rows

    def find(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows of samples, int64 [B], and those of the ids that are not there."""
        if self._table is not None:
            try:
                rows = self._table.take(sample_ids)
            except IndexError:
                rows = None
            if rows is not None and len(rows) and rows.min() >= 0 and sample_ids.min() >= 0:
                return rows, sample_ids[:0]
        at = np.minimum(np.searchsorted(self._ids, sample_ids), len(self._ids) - 1)
        return self._rows[at], sample_ids[self._ids[at] != sample_ids]
