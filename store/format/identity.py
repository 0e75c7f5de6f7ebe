"""Identity of a store: the inputs that decide its numbers, and the fingerprint over them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def canonical_json(value: Any) -> str:
    """Return the canonical JSON text of a value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def sha256_of(value: Any) -> str:
    """Return the hexadecimal sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """Teacher, data set and views of a store, as JSON objects. Independent of the machine: no paths, no dates.

    The list of arrays and the number of views are not included, so that a store can gain layers or views and keep
    its fingerprint. Arrays and their precision are compared one by one.
    """

    teacher: Mapping[str, Any]
    data: Mapping[str, Any]
    views: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"teacher": dict(self.teacher), "data": dict(self.data), "views": dict(self.views)}

    @property
    def fingerprint(self) -> str:
        return sha256_of(self.to_json())
