"""Open a store, after checking everything but the rows themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdpipe.store.errors import StoreError
from kdpipe.store.format.layout import ArraySpec, Unit
from kdpipe.store.format.manifest import Manifest, require
from kdpipe.store.format.markers import Marker, read_marker
from kdpipe.store.format.samples import read_samples
from kdpipe.store.format.shard import check_index, shard_path, shard_shape
from kdpipe.store.format.zarr_metadata import check_arrays, read_store_manifest
from kdpipe.store.fs.safe_read import open_regular_file
from kdpipe.store.read.mapped_views import damaged
from kdpipe.store.read.target_store import TargetStore, finished_part, visible_layout


def open_store(path: Path, expected: Mapping[str, Any] | None = None, advice: str = "") -> TargetStore:
    """Open the store at `path`: of one that is being extended, the part that was finished before.

    Metadata, markers, sizes and shard indices are checked; rows are checked when they are read into memory, and by
    `kdpipe store verify`.

    Args:
        path: The store.
        expected: Required values of its manifest, by section (teacher, data, views, arrays).
        advice: What to do on a mismatch, appended to the error.

    Raises:
        FingerprintMismatch: The store has other values, listed pair by pair.
        StoreError: There is no store, a unit is missing, or a file is damaged.
    """
    manifest = read_store_manifest(path)
    require(manifest, expected or {}, f"the store {path}", advice)
    check_arrays(path, manifest)
    finished = finished_part(path, manifest)
    layout = visible_layout(manifest.layout, finished)
    markers = {}
    for unit in layout.units():
        marker = read_marker(path, manifest, unit)
        if marker is None:
            raise StoreError(f"{path} is not complete: {unit} is missing. Run `kdpipe cache-teacher` to finish it.")
        for name in finished.arrays:
            check_file(path, manifest, manifest.spec(name), unit, marker)
        markers[unit] = marker
    samples = read_samples(path, manifest.layout, manifest.identity.data)
    return TargetStore(path, manifest, samples.take(np.arange(layout.num_samples)), markers)


def check_file(path: Path, manifest: Manifest, spec: ArraySpec, unit: Unit, marker: Marker) -> None:
    """Raise StoreError unless the shard file of `unit` exists, with its committed size and the expected index."""
    file, entry = shard_path(path, spec, unit), marker.files.get(spec.name)
    if entry is None:
        raise StoreError(f"{path} is not complete: {unit} lacks {spec.name}. Run `kdpipe cache-teacher` to finish it.")
    shape = shard_shape(spec, manifest.layout.unit_rows)
    expected = shape.file_bytes(unit.num_rows) if manifest.codec is None else entry["bytes"]
    try:
        descriptor = open_regular_file(file, path)
        try:
            num_bytes = os.fstat(descriptor).st_size
            index = os.pread(descriptor, shape.index_bytes, max(0, expected - shape.index_bytes))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StoreError(damaged(file, unit, f"it cannot be read ({error.strerror})")) from error
    if num_bytes != expected or entry["bytes"] != expected:
        raise StoreError(damaged(file, unit, f"it has {num_bytes:,} bytes, {expected:,} were committed"))
    if manifest.codec is None:
        check_index(index, shape, unit.num_rows, str(file))
