"""Paths of a million files in two arrays: worker processes that fork share them, and never copy a page.

A tuple of a million `Path` objects would be copied into each worker, little by little, as reference counts change.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Paths:
    """N paths: `text` holds their bytes one behind the other, uint8 [T]; `ends` where each ends, int64 [N]."""

    text: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.int64]

    @classmethod
    def of(cls, paths: Iterable[str | Path]) -> Self:
        encoded = [os.fsencode(path) for path in paths]
        ends = np.cumsum([len(one) for one in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, at: int) -> Path:
        if not 0 <= at < len(self.ends):
            raise IndexError(f"no path {at}: there are {len(self.ends)}")
        start = self.ends[at - 1] if at else 0
        return Path(os.fsdecode(self.text[start : self.ends[at]].tobytes()))

    def __iter__(self) -> Iterator[Path]:
        return (self[at] for at in range(len(self)))

    def take(self, rows: npt.NDArray[np.int64]) -> Self:
        """The paths at `rows`, int64 [M], in that order."""
        lengths = np.diff(self.ends, prepend=0)[rows]
        text, starts = self.text.data, self.ends[rows] - lengths
        pieces = (text[start : start + length] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True))
        return type(self)(np.frombuffer(b"".join(pieces), dtype=np.uint8), np.cumsum(lengths))
