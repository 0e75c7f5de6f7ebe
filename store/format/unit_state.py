"""State of a store's units: what is committed, what is missing, and how many bytes that takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kdpipe.store.errors import StoreError
from kdpipe.store.format.layout import ArraySpec, Unit
from kdpipe.store.format.manifest import Manifest
from kdpipe.store.format.markers import Marker, read_marker
from kdpipe.store.format.shard import shard_path, shard_shape


@dataclass(frozen=True)
class StoreState:
    """How far a store is filled.

    Attributes:
        missing: Units that lack at least one array.
        num_bytes: Bytes of the committed shards.
    """

    num_units: int
    missing: tuple[Unit, ...]
    num_bytes: int


def store_state(path: Path, manifest: Manifest) -> StoreState:
    """Check the marker and the shard sizes of every unit, without reading any shard."""
    missing, num_bytes, units = [], 0, manifest.layout.units()
    for unit in units:
        files = committed(path, manifest, unit).files
        lacking = missing_arrays(path, manifest, unit)
        if lacking:
            missing.append(unit)
        num_bytes += sum(file["bytes"] for name, file in files.items() if name not in lacking)
    return StoreState(len(units), tuple(missing), num_bytes)


def committed(path: Path, manifest: Manifest, unit: Unit) -> Marker:
    """Return the marker of `unit`; an empty one where it has none that can be read."""
    try:
        return read_marker(path, manifest, unit) or Marker({})
    except StoreError:
        return Marker({})


def missing_arrays(path: Path, manifest: Manifest, unit: Unit) -> tuple[str, ...]:
    """Return the arrays that `unit` lacks: not in its marker, or with an absent or wrongly sized file."""
    marker = committed(path, manifest, unit)
    return tuple(spec.name for spec in manifest.arrays if not _is_there(path, manifest, unit, spec, marker))


def missing_units(path: Path, manifest: Manifest) -> list[Unit]:
    """Return the units that are not done in every array, in order."""
    return [unit for unit in manifest.layout.units() if missing_arrays(path, manifest, unit)]


def _is_there(path: Path, manifest: Manifest, unit: Unit, spec: ArraySpec, marker: Marker) -> bool:
    entry = marker.files.get(spec.name)
    file = shard_path(path, spec, unit)
    if entry is None or not file.is_file():
        return False
    unpacked = shard_shape(spec, manifest.layout.unit_rows).file_bytes(unit.num_rows)
    size = file.stat().st_size
    return size == entry["bytes"] and (manifest.codec is not None or size == unpacked)


def store_bytes(manifest: Manifest, units: Iterable[Unit], names: Iterable[str] | None = None) -> int:
    """Return the bytes of the unpacked shards of `units`, in all arrays or in those called `names`."""
    chosen = None if names is None else set(names)
    shapes = [
        shard_shape(spec, manifest.layout.unit_rows)
        for spec in manifest.arrays
        if chosen is None or spec.name in chosen
    ]
    return sum(shape.file_bytes(unit.num_rows) for unit in units for shape in shapes)
