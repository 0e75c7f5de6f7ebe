"""Units read into memory and kept while they fit: how rows are read where an array cannot be mapped."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from store.format.layout import Unit

CACHE_BYTES = 2**30
"""What a store keeps of units that it had to read into memory, all arrays together."""


class UnitCache:
    """The units read last, up to CACHE_BYTES; one unit stays whatever its size."""

    def __init__(self, read: Callable[[str, Unit], NDArray[Any]], max_bytes: int = CACHE_BYTES) -> None:
        self._read = read
        self._most_bytes = max_bytes
        self._held: OrderedDict[tuple[str, Unit], NDArray[Any]] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        return sum(rows.nbytes for rows in self._held.values())

    def rows(self, name: str, unit: Unit) -> NDArray[Any]:
        """The rows of a unit, [n, *row_shape]."""
        key = (name, unit)
        if key not in self._held:
            self._held[key] = self._read(name, unit)
            while len(self._held) > 1 and self.num_bytes > self._most_bytes:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]
