"""Whose outputs, of which samples, on which views: what decides the numbers in a store, and the fingerprint over it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def sha256_of(value: Any) -> str:
    """sha256, in hexadecimal, over the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """What decides the numbers in a store, as JSON objects. Nothing here depends on the machine: no paths, no dates.

    The list of arrays and the number of views are not part of it: a store may grow by a layer or by views, and stays
    the same store. Arrays are compared one by one, their precision with them.
    """

    teacher: Mapping[str, Any]
    data: Mapping[str, Any]
    views: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"teacher": dict(self.teacher), "data": dict(self.data), "views": dict(self.views)}

    @property
    def fingerprint(self) -> str:
        """sha256, in hexadecimal, over the canonical JSON of this identity."""
        return sha256_of(self.to_json())
