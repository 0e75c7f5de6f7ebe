"""Logits of 8 or 4 bits a class: a row is its largest logit, its range, and the place of each class in this range.

Both are half precision. The range is divided unevenly, finer near the largest logit, where a softmax is:

    logit = largest - range * (code / (2^bits - 1)) ^ (4/3).

The largest logit has code 0. All of a row is one run of bytes, so that one gather reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.errors import StoreError
from kdpipe.store.format.layout import ArraySpec

PACKED = "logits/packed"
"""The array that replaces `logits`."""

BITS = {"int8": 8, "int4": 4}

HEADER_BYTES = 4
"""Of the largest logit and the range, float16 each."""

EXPONENT = 4.0 / 3.0
"""Of the classes' places: 1 would be even steps, of which more rows share the first (see docs/encodings.md)."""

LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Quantized:
    """Layout of logits of `num_classes` classes in 8 bits each ("int8") or 4 ("int4").

    Raises:
        TypeError, ValueError: A value is invalid.
    """

    all_logits: ClassVar[bool] = True

    name: str
    num_classes: int

    def __post_init__(self) -> None:
        if self.name not in BITS or type(self.num_classes) is not int:
            raise TypeError(f"quantized logits are {self.name!r:.40} of {self.num_classes!r:.40} classes")
        if not 1 <= self.num_classes <= 2**31:
            raise ValueError(f"quantized logits are of {self.num_classes} classes")

    @property
    def bits(self) -> int:
        return BITS[self.name]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "num_classes": self.num_classes}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Quantized:
        """Parse the result of `to_json`. Raises TypeError, ValueError or KeyError on anything else."""
        return Quantized(record["name"], record["num_classes"])

    def arrays(self, dtype: str) -> tuple[ArraySpec, ...]:
        """Return the arrays of a store with such logits, whatever the `dtype` of its features."""
        return (ArraySpec(PACKED, (HEADER_BYTES + -(-self.num_classes * self.bits // 8),), "uint8"),)

    def describe(self) -> str:
        return f"logits of {self.num_classes} classes, {self.bits} bits each"

    @cached_property
    def places(self) -> NDArray[np.float32]:
        """The place of each code in the range, from 0 (the largest logit) to 1 (the smallest): float32 [2^bits]."""
        top = 2**self.bits - 1
        return np.asarray((np.arange(top + 1) / top) ** EXPONENT, np.float32)

    @cached_property
    def tables(self) -> NDArray[np.float32]:
        """The places of the classes that a byte has, by byte: float32 [1, 256] or, of two classes, [2, 256]."""
        byte = np.arange(256)
        return self.places[byte[None]] if self.bits == 8 else self.places[np.stack([byte & 15, byte >> 4])]

    def encode(
        self, logits: NDArray[np.float32], dtype: str, sample_ids: NDArray[np.int64], view: int
    ) -> dict[str, NDArray[Any]]:
        """Encode rows [n, C], by array name: uint8 [n, bytes].

        Raises StoreError, listing rows, where a row is not finite or its largest logit too large for float16.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, by row
            largest = logits.max(axis=1, keepdims=True).astype("<f2")
            spread = largest.astype(np.float32) - logits.min(axis=1, keepdims=True)
            # A class further below than the largest half has no mass at any temperature: it counts as this far.
            spread = np.clip(spread, 0.0, LARGEST_HALF).astype("<f2")
        bad = ~(np.isfinite(logits).all(axis=1) & np.isfinite(largest)[:, 0])
        if bad.any():
            rows = np.flatnonzero(bad)
            raise StoreError(
                f"the logits of {len(rows)} of {len(bad)} rows are not finite, or too large for {self.name}, for "
                f"example rows {rows[:5].tolist()}: fix the teacher, or store float32."
            )
        header = np.concatenate([largest, spread], axis=1).view(np.uint8)
        return {PACKED: np.concatenate([header, self._codes(logits, largest, spread)], axis=1)}

    def _codes(
        self, logits: NDArray[np.float32], largest: NDArray[np.float16], spread: NDArray[np.float16]
    ) -> NDArray[np.uint8]:
        """Return the code of each class, packed: uint8 [n, C], or [n, ceil(C / 2)] with the even classes low."""
        distance = np.maximum(largest.astype(np.float32) - logits, 0) / np.maximum(spread.astype(np.float32), 1e-30)
        place = np.minimum(distance, 1.0) ** np.float32(1 / EXPONENT)
        codes = np.asarray(np.rint(place * np.float32(2**self.bits - 1)), np.uint8)
        if self.bits == 8:
            return codes
        pairs = np.pad(codes, ((0, 0), (0, self.num_classes % 2)))
        return np.asarray(pairs[:, ::2] | pairs[:, 1::2] << 4, np.uint8)

    def require_temperature(self, temperature: float) -> None:
        """Accept any temperature."""

    def decode(self, arrays: Mapping[str, NDArray[Any]], temperature: float = 1.0) -> NDArray[np.float32]:
        """Return the logits [n, C] of encoded rows: the same at any temperature."""
        packed = np.ascontiguousarray(arrays[PACKED])
        largest, spread = packed[:, :HEADER_BYTES].copy().view("<f2").astype(np.float32).T[:, :, None]
        columns = [table[packed[:, HEADER_BYTES:]] for table in self.tables]
        places = np.stack(columns, axis=2).reshape(len(packed), -1)[:, : self.num_classes]
        with np.errstate(invalid="ignore"):  # of forged rows
            return np.asarray(largest - spread * places, np.float32)
