"""Cache of units read into memory, for arrays that cannot be mapped."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from kdpipe.store.format.layout import Unit

CACHE_BYTES = 2**30
"""Default limit of a store's cache, all arrays together."""


class UnitCache:
    """The most recently used units, up to `max_bytes`; at least one unit is kept, whatever its size."""

    def __init__(self, read: Callable[[str, Unit], NDArray[Any]], max_bytes: int = CACHE_BYTES) -> None:
        self._read = read
        self._most_bytes = max_bytes
        self._units: OrderedDict[tuple[str, Unit], NDArray[Any]] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        return sum(rows.nbytes for rows in self._units.values())

    def rows(self, name: str, unit: Unit) -> NDArray[Any]:
        """Return the rows of a unit, [n, *row_shape]."""
        key = (name, unit)
        if key not in self._units:
            self._units[key] = self._read(name, unit)
            while len(self._units) > 1 and self.num_bytes > self._most_bytes:
                self._units.popitem(last=False)
        self._units.move_to_end(key)
        return self._units[key]
