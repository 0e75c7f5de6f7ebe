"""Creating a store and filling it, unit by unit, so that a kill at any moment leaves only whole units."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from store.durable import PARTIAL_SUFFIX, fsync_path, make_folders, write_atomically
from store.errors import StoreError
from store.geometry import ArraySpec, Unit, all_units
from store.manifest import Manifest, require
from store.markers import marker_bytes, marker_path, read_marker, write_marker
from store.samples import Samples
from store.shard import crc32c, encode_shard, shard_path, shard_shape
from store.zarr_group import create_group, read_store_manifest


def create_store(path: Path, manifest: Manifest, samples: Samples) -> None:
    """Make an empty store at `path`: metadata and samples, all there or nothing."""
    make_folders([path.parent])
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")
    try:
        create_group(aside, manifest, samples)
        for entry in aside.rglob("*"):
            fsync_path(entry)
        aside.rename(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync_path(path.parent)


def require_same(path: Path, manifest: Manifest) -> None:
    """Raise FingerprintMismatch, pair by pair, unless the store at `path` is what `manifest` would have made."""
    provenance = ("versions", "fingerprint", "schema_version")
    wanted = {key: value for key, value in manifest.to_json().items() if key not in provenance}
    advice = "Give this recipe another run folder or cache.store, or delete the store to cache again."
    require(read_store_manifest(path), wanted, f"the store {path}", advice)


def missing_units(path: Path, manifest: Manifest) -> list[Unit]:
    """The units that are not done, in order: no marker says so, or a file of theirs is gone or of another size."""
    units = all_units(manifest.num_views, manifest.num_samples, manifest.unit_rows)
    return [unit for unit in units if not _is_done(path, manifest, unit)]


def write_unit(path: Path, manifest: Manifest, unit: Unit, rows: Mapping[str, NDArray[np.floating]]) -> int:
    """Write and commit one unit: `rows` has, for every array of the store, its rows [n, *row_shape].

    Returns the bytes written. Raises StoreError where rows do not fit the array or are not finite, or where the disk
    refuses; the unit is then not committed, and whatever was there before stays.
    """
    files = {}
    for spec in manifest.arrays:
        _check_rows(spec, unit, rows[spec.name])
        parts = encode_shard(rows[spec.name], shard_shape(spec, manifest.unit_rows))
        _write(shard_path(path, spec, unit), parts)
        files[spec.name] = {"bytes": sum(len(part) for part in parts), "crc32c": crc32c(*parts)}
    make_folders([marker_path(path, unit).parent])
    write_marker(path, unit, manifest.identity.fingerprint, files, marker_bytes(manifest.arrays))
    return sum(file["bytes"] for file in files.values())


def store_bytes(manifest: Manifest, units: Iterable[Unit]) -> int:
    """Bytes that the shards of `units` take on disk."""
    shapes = [shard_shape(spec, manifest.unit_rows) for spec in manifest.arrays]
    return sum(shape.file_bytes(unit.num_rows) for unit in units for shape in shapes)


def _is_done(path: Path, manifest: Manifest, unit: Unit) -> bool:
    if read_marker(path, unit, manifest.identity.fingerprint) is None:
        return False
    for spec in manifest.arrays:
        file = shard_path(path, spec, unit)
        expected = shard_shape(spec, manifest.unit_rows).file_bytes(unit.num_rows)
        if not file.is_file() or file.stat().st_size != expected:
            return False
    return True


def _check_rows(spec: ArraySpec, unit: Unit, rows: NDArray[np.floating]) -> None:
    if rows.shape != (unit.num_rows, *spec.row_shape) or rows.dtype != np.dtype(spec.dtype):
        raise StoreError(
            f"{spec.name} of {unit} is {rows.dtype}{list(rows.shape)}, "
            f"the store has {spec.dtype}{[unit.num_rows, *spec.row_shape]}."
        )
    if not np.isfinite(rows).all():
        raise StoreError(f"{spec.name} of {unit} holds NaN or infinity, which a store never does.")


def _write(target: Path, parts: list[bytes | memoryview]) -> None:
    try:
        make_folders([target.parent])
        write_atomically(target, *parts)
    except OSError as error:
        needed = sum(len(part) for part in parts)
        raise StoreError(
            f"cannot write {target} ({error.strerror}): {needed:,} bytes needed. What is committed is safe; "
            "make room, and run the same command again."
        ) from error
