"""Repair a damaged store as far as possible without the teacher: manifest, samples, and what counts as done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.store.check.verify import Fault
from kdpipe.store.errors import StoreError
from kdpipe.store.format.identity import sha256_of
from kdpipe.store.format.layout import StoreLayout, Unit
from kdpipe.store.format.manifest import Manifest
from kdpipe.store.format.markers import Marker, checked_record, read_marker, remove_marker, write_marker
from kdpipe.store.format.samples import Samples, read_column, row_order, sample_chunks
from kdpipe.store.format.schema import ATTRIBUTE, MARKER_BYTES, MARKERS, MAX_UNITS, METADATA_BYTES, SCHEMA_VERSION
from kdpipe.store.format.shard import shard_shape
from kdpipe.store.fs.atomic_write import make_folders, write_atomically
from kdpipe.store.fs.lock import Holder
from kdpipe.store.fs.safe_read import read_json, read_regular_file
from kdpipe.store.write.claims import claimed

HOPELESS = "cannot be repaired: delete it, and cache again"


def uncommit(path: Path, manifest: Manifest, faults: Iterable[Fault]) -> list[Unit]:
    """Revoke that the damaged arrays of units are done, of a damaged marker all arrays, and return these units.

    Raises LockedError where another job is computing one of them.
    """
    bad: dict[Unit, set[str | None]] = {}
    for fault in faults:
        if fault.unit is not None:
            bad.setdefault(fault.unit, set()).add(fault.array)
    for unit, names in bad.items():
        with claimed(path, unit.key, partial(_in_use, path, unit)):
            _uncommit_arrays(path, manifest, unit, names)
    return list(bad)


def _in_use(path: Path, unit: Unit, holder: Holder) -> str:
    return f"{unit} of {path} is being computed by {holder}: wait for that job, or stop it first."


def _uncommit_arrays(path: Path, manifest: Manifest, unit: Unit, names: set[str | None]) -> None:
    try:
        marker = read_marker(path, manifest, unit)
    except StoreError:
        marker = None
    files = {} if marker is None or None in names else {k: v for k, v in marker.files.items() if k not in names}
    if marker is not None and files:
        write_marker(path, manifest, unit, Marker(files, marker.fidelity))
    else:
        remove_marker(path, unit)


def rebuild_manifest(path: Path, planned: Manifest) -> Manifest:
    """Rebuild a lost manifest from the one that a recipe plans, if the markers support it.

    Each marker records its fingerprint and number of rows. The result is not `finished`: that is to be determined
    again.

    Raises:
        StoreError: The store is another one, or was extended by samples since.
    """
    _require_same_schema(path)
    arrays = tuple(spec for spec in planned.arrays if (path / spec.name).is_dir())
    num_views = _num_views(path) or planned.layout.num_views
    rebuilt = replace(planned, arrays=arrays, layout=replace(planned.layout, num_views=num_views), finished=None)
    units = {unit.key: unit for unit in rebuilt.layout.units()}
    records = _marker_records(path)
    if not records:
        raise StoreError(f"{path} has neither a manifest nor a marker that can be read: it {HOPELESS}.")
    for key, record in records.items():
        if key not in units or not _supports(record, rebuilt, units[key]):
            raise StoreError(
                f"the manifest of {path} is damaged, and its marker {key} was not written for what this recipe plans "
                f"(fingerprint {planned.identity.fingerprint}): it is another recipe's store, or {HOPELESS}."
            )
    return rebuilt


def _require_same_schema(path: Path) -> None:
    """Raise StoreError if the manifest is unreadable because another kdpipe wrote it.

    If only its schema version was damaged, its checksum matches once that is corrected: then it can be repaired.
    """
    try:
        record = dict(read_json(path / "zarr.json", METADATA_BYTES, StoreError, path)["attributes"][ATTRIBUTE])
        stated, checksum = record["schema_version"], record.pop("sha256", None)
        other = stated != SCHEMA_VERSION and checksum != sha256_of({**record, "schema_version": SCHEMA_VERSION})
    except (OSError, StoreError, ValueError, KeyError, TypeError):
        return
    if other:
        raise StoreError(f"{path} has store schema {str(stated)[:40]}: only the kdpipe that wrote it can repair it.")


def _num_views(path: Path) -> int | None:
    """Return the number of views in the metadata of the markers; None if it cannot be read."""
    try:
        num_views = read_json(path / MARKERS / "zarr.json", METADATA_BYTES, StoreError, path)["shape"][0]
    except (OSError, StoreError, KeyError, TypeError, IndexError):
        return None
    return num_views if type(num_views) is int and 0 < num_views < MAX_UNITS else None


def _marker_records(path: Path) -> dict[str, dict[str, Any]]:
    """Return the records of the undamaged markers, by the keys of their units."""
    records = {}
    for file in sorted((path / MARKERS / "c").glob("*/*/0")):
        try:
            record = checked_record(read_regular_file(file, MARKER_BYTES, path))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            continue
        records[f"v{file.parent.parent.name}-s{file.parent.name}"] = record
    return records


def _supports(record: Mapping[str, Any], manifest: Manifest, unit: Unit) -> bool:
    sizes = {
        spec.name: shard_shape(spec, manifest.layout.unit_rows).file_bytes(unit.num_rows) for spec in manifest.arrays
    }
    try:
        files_fit = all(sizes[name] == file["bytes"] for name, file in record["files"].items())
    except (KeyError, TypeError, AttributeError):
        return False
    return (
        files_fit and record.get("fingerprint") == manifest.identity.fingerprint and record.get("rows") == unit.num_rows
    )


def restore_samples(path: Path, manifest: Manifest, known: Samples) -> None:
    """Rewrite the damaged sample arrays from the samples of the data set, in any order.

    Raises StoreError where that is another one, or does not determine the row of each sample.
    """
    samples = known.take(known.positions_of(_ids_by_row(path, manifest, known)))
    if any(manifest.identity.data.get(name) != digest for name, digest in samples.digests().items()):
        raise StoreError(
            f"the samples of {path} are damaged, and this recipe's data set is not the one that it was made from: use "
            f"the recipe that made it, or else it {HOPELESS}."
        )
    for key, raw in sample_chunks(samples, manifest.layout):
        file = path / key
        if not file.is_file() or file.read_bytes() != raw:
            make_folders([file.parent])
            write_atomically(file, raw)


def _stored_ids(path: Path, layout: StoreLayout) -> NDArray[np.int64] | None:
    """Return the id in each row [num_samples] as stored; None where a chunk is lost."""

    def read(key: str, max_bytes: int) -> bytes | None:
        with suppress(OSError):
            return read_regular_file(path / key, max_bytes, path)
        return None

    with suppress(StoreError):
        return read_column(read, "ids", layout, str(path))[layout.sample_rows()].astype(np.int64)
    return None


def _ids_by_row(path: Path, manifest: Manifest, known: Samples) -> NDArray[np.int64]:
    """Return the id in each row [num_samples]; damaged ones are deduced, as a segment is in `row_order`."""
    seed, segments = int(manifest.identity.views["seed"]), manifest.layout.segments
    stored = _stored_ids(path, manifest.layout)
    if stored is not None and np.array_equal(np.sort(stored), np.sort(known.ids)):
        return stored
    if len(segments) == 1:
        return known.ids[row_order(known.ids, seed)]
    if stored is not None:
        unique, counts = np.unique(stored, return_counts=True)
        good = np.isin(stored, unique[counts == 1]) & np.isin(stored, known.ids)
        lost = np.setdiff1d(known.ids, stored[good])
        segment_of = np.repeat(np.arange(len(segments)), segments)
        damaged_segments = np.unique(segment_of[~good])
        if len(damaged_segments) == 1 and len(lost) == np.count_nonzero(~good):
            inside = segment_of == damaged_segments[0]
            members = np.concatenate([stored[good & inside], lost])
            stored[inside] = members[row_order(members, seed)]
            return stored
    raise StoreError(
        f"the sample ids of {path} are damaged, and this recipe's data set does not determine them: use the "
        f"recipe that made it, or else it {HOPELESS}."
    )
