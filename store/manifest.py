"""What a store says it is: whose outputs, for which samples, on which views - and the fingerprint over that."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from store.errors import FingerprintMismatch, StoreError, differences
from store.geometry import DTYPES, ArraySpec

SCHEMA_VERSION = 1
ATTRIBUTE = "kdpipe"
"""The key in the Zarr group's attributes under which the manifest stands."""

MOST = 2**40
"""No store has more views, samples or rows than this: a count beyond it is damage, or an attack."""

ARRAY_NAME = re.compile(r"logits|features/[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""What an array may be called: names become paths, and must not climb out of the store."""


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


@dataclass(frozen=True)
class Identity:
    """What decides the numbers in a store, as JSON objects. Nothing here depends on the machine: no paths, no dates.

    The list of arrays is not part of it: a store may grow by another layer, and stays the same store. Arrays are
    compared one by one (`require`), their precision with them.
    """

    teacher: Mapping[str, Any]
    data: Mapping[str, Any]
    views: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"teacher": dict(self.teacher), "data": dict(self.data), "views": dict(self.views)}

    @property
    def fingerprint(self) -> str:
        """sha256, in hexadecimal, over the canonical JSON of this identity."""
        return hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """All that stands in a store's group attributes."""

    identity: Identity
    arrays: tuple[ArraySpec, ...]
    num_views: int
    num_samples: int
    unit_rows: int
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.identity.fingerprint,
            **self.identity.to_json(),
            "arrays": {spec.name: spec.to_json() for spec in self.arrays},
            "num_views": self.num_views,
            "num_samples": self.num_samples,
            "unit_rows": self.unit_rows,
            "versions": dict(self.versions),
        }

    def spec(self, name: str) -> ArraySpec:
        """The array called `name`. Raises StoreError, listing what there is, if the store has none."""
        for spec in self.arrays:
            if spec.name == name:
                return spec
        held = ", ".join(spec.name for spec in self.arrays)
        raise StoreError(
            f"the store holds no array {name!r}, only {held}: add the layer to the recipe's cache.layers, "
            "give the store another place (cache.store), and run `kdpipe cache-teacher` again."
        )


def read_manifest(attributes: Any, where: str) -> Manifest:
    """Parse a store's group attributes. Raises StoreError where they are not a manifest of this schema."""
    record = attributes.get(ATTRIBUTE) if isinstance(attributes, Mapping) else None
    if not isinstance(record, Mapping):
        raise StoreError(f"{where} is a Zarr group, but not a kdpipe target store: it has no {ATTRIBUTE!r} attribute.")
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{where} has store schema {version!r}, this kdpipe reads {SCHEMA_VERSION}: use the kdpipe that wrote it."
        )
    try:
        manifest = _parse(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{where} has a damaged manifest ({type(error).__name__}: {error}).") from error
    if record.get("fingerprint") != manifest.identity.fingerprint:
        raise StoreError(f"{where} has a manifest that was edited: its fingerprint does not fit its contents.")
    return manifest


def _parse(record: Mapping[str, Any]) -> Manifest:
    counts = [record[key] for key in ("num_views", "num_samples", "unit_rows")]
    if not all(type(count) is int and 0 < count < MOST for count in counts):
        raise ValueError(f"num_views, num_samples and unit_rows are {counts}")
    for name, spec in record["arrays"].items():
        sides = spec["row_shape"]
        if not ARRAY_NAME.fullmatch(name) or spec["dtype"] not in DTYPES or not _is_shape(sides):
            raise ValueError(f"array {name!r} is {spec}")
    arrays = tuple(
        ArraySpec(str(name), tuple(spec["row_shape"]), str(spec["dtype"])) for name, spec in record["arrays"].items()
    )
    return Manifest(
        identity=Identity(dict(record["teacher"]), dict(record["data"]), dict(record["views"])),
        arrays=arrays,
        num_views=int(record["num_views"]),
        num_samples=int(record["num_samples"]),
        unit_rows=int(record["unit_rows"]),
        versions={str(name): str(version) for name, version in record["versions"].items()},
    )


def _is_shape(sides: Any) -> bool:
    counts = all(type(side) is int and 0 < side < MOST for side in sides)
    return isinstance(sides, list) and bool(sides) and counts and math.prod(sides) < MOST


def require(stored: Manifest, wanted: Mapping[str, Any], where: str, advice: str) -> None:
    """Raise FingerprintMismatch, pair by pair, unless `stored` has every value that `wanted` names.

    `wanted` is a part of `Manifest.to_json()`: a section that it leaves out may be anything.
    """
    held = stored.to_json()
    found = [pair for section in sorted(wanted) for pair in differences(held.get(section), wanted[section], section)]
    if found:
        raise FingerprintMismatch(where, found, advice)


def wanted_arrays(specs: Sequence[ArraySpec]) -> dict[str, Any]:
    """The `arrays` section of a manifest with these arrays."""
    return {spec.name: spec.to_json() for spec in specs}
