"""Putting a damaged store right, as far as that needs no teacher: its manifest, its samples, what counts as done."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.write.claims import Holder, claim
from store.fs.atomic_write import make_folders, write_atomically
from store.errors import StoreError
from store.format.layout import Unit
from store.format.identity import sha256_of
from store.fs.lock import LockedError
from store.format.manifest import ATTRIBUTE, SCHEMA_VERSION, Manifest
from store.format.markers import MARKER_BYTES, MARKERS, Marker, checked_record, read_marker, remove_marker, write_marker
from store.fs.safe_read import read_regular_file
from store.format.samples import CHUNK_ROWS, COLUMNS, SAMPLES, Samples, row_order, sample_chunks
from store.format.shard import shard_shape
from store.check.verify import Fault
from store.format.zarr_metadata import METADATA_BYTES

HOPELESS = "cannot be repaired: delete it, and cache again"


def uncommit(path: Path, manifest: Manifest, faults: Iterable[Fault]) -> list[Unit]:
    """Take back that the damaged arrays of units are done, and return these units; a damaged marker takes all of its
    unit's arrays with it. Raises LockedError, naming who it is, where another job is at one of them.
    """
    bad: dict[Unit, set[str | None]] = {}
    for fault in faults:
        if fault.unit is not None:
            bad.setdefault(fault.unit, set()).add(fault.array)
    for unit, names in bad.items():
        held = claim(path, unit.key)
        if isinstance(held, Holder):
            raise LockedError(f"{unit} of {path} is being computed by {held}: wait for that job, or stop it first.")
        try:
            _take_back(path, manifest, unit, names)
        finally:
            held.release()
    return list(bad)


def _take_back(path: Path, manifest: Manifest, unit: Unit, names: set[str | None]) -> None:
    try:
        marker = read_marker(path, manifest, unit)
    except StoreError:
        marker = None
    files = {} if marker is None or None in names else {k: v for k, v in marker.files.items() if k not in names}
    if marker is not None and files:
        write_marker(path, manifest, unit, Marker(files, marker.fidelity))
    else:
        remove_marker(path, unit)


def rebuild_manifest(path: Path, transcoded_manifest: Manifest) -> Manifest:
    """What a store whose own manifest is lost must have been, if it is the one that a recipe plans.

    The markers must bear that out: each says for which fingerprint and how many rows it was written. What was
    finished is to be found out anew. Raises StoreError where the store is another one, or has grown since by samples.
    """
    _require_same_schema(path)
    arrays = tuple(spec for spec in transcoded_manifest.arrays if (path / spec.name).is_dir())
    num_views = _num_views(path) or transcoded_manifest.layout.num_views
    rebuilt = replace(transcoded_manifest, arrays=arrays, layout=replace(transcoded_manifest.layout, num_views=num_views), finished=None)
    units = {unit.key: unit for unit in rebuilt.layout.units()}
    records = _marker_records(path)
    if not records:
        raise StoreError(f"{path} has neither a manifest nor a marker that can be read: it {HOPELESS}.")
    for key, record in records.items():
        if key not in units or not _bears_out(record, rebuilt, units[key]):
            raise StoreError(
                f"the manifest of {path} is damaged, and its marker {key} was not written for what this recipe plans "
                f"(fingerprint {transcoded_manifest.identity.fingerprint}): it is another recipe's store, or {HOPELESS}."
            )
    return rebuilt


def _require_same_schema(path: Path) -> None:
    """A manifest that cannot be read because another kdpipe wrote it is not damaged. One whose schema version exclusive_store was
    damaged is: its checksum fits as soon as that is put right.
    """
    try:
        record = dict(json.loads(read_regular_file(path / "zarr.json", METADATA_BYTES, path))["attributes"][ATTRIBUTE])
        stated, checksum = record["schema_version"], record.pop("sha256", None)
        other = stated != SCHEMA_VERSION and checksum != sha256_of({**record, "schema_version": SCHEMA_VERSION})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if other:
        raise StoreError(f"{path} has store schema {str(stated)[:40]}: only the kdpipe that wrote it can repair it.")


def _num_views(path: Path) -> int | None:
    """The number of views that the metadata of the markers states, if it can be read."""
    try:
        view_count = json.loads(read_regular_file(path / MARKERS / "zarr.json", METADATA_BYTES, path))["shape"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return view_count if type(view_count) is int and 0 < view_count < 2**20 else None


def _marker_records(path: Path) -> dict[str, dict[str, Any]]:
    """What the undamaged markers say, by the keys of their units."""
    records = {}
    for file in sorted((path / MARKERS / "c").glob("*/*/0")):
        try:
            record = checked_record(read_regular_file(file, MARKER_BYTES, path))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            continue
        records[f"v{file.parent.parent.name}-s{file.parent.name}"] = record
    return records


def _bears_out(record: Mapping[str, Any], manifest: Manifest, unit: Unit) -> bool:
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
    """Write the sample arrays anew from those of the data set, in any order, wherever they are damaged.

    Raises StoreError where the data set is another one, or does not tell in which row each sample stood.
    """
    layout = manifest.layout
    held = {name: _held_column(path, name, manifest) for name in COLUMNS}
    ids = _ids_by_row(path, manifest, held["ids"][0], known)
    samples = known.take(known.positions_of(ids))
    digests = samples.digests()
    fits = all(manifest.identity.data.get(name) == digest for name, digest in digests.items())
    if not fits or _contradicts(held, samples):
        raise StoreError(
            f"the samples of {path} are damaged, and this recipe's data set is not the one that it was made from: use "
            f"the recipe that made it, or else it {HOPELESS}."
        )
    for key, raw in sample_chunks(samples, layout):
        file = path / key
        if not file.is_file() or file.read_bytes() != raw:
            make_folders([file.parent])
            write_atomically(file, raw)


def _held_column(path: Path, name: str, manifest: Manifest) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """A sample array [num_samples] as it lies there, and which of it can be read at all."""
    dtype = np.dtype(COLUMNS[name][0]).newbyteorder("<")
    parts, there = [], []
    for chunk in range(-(-manifest.layout.num_rows // CHUNK_ROWS)):
        try:
            raw = read_regular_file(path / SAMPLES / name / "c" / str(chunk), CHUNK_ROWS * dtype.itemsize, path)
        except OSError:
            raw = b""
        whole = len(raw) == CHUNK_ROWS * dtype.itemsize
        parts.append(np.frombuffer(raw, dtype) if whole else np.full(CHUNK_ROWS, COLUMNS[name][1], dtype))
        there.append(np.full(CHUNK_ROWS, whole))
    rows = manifest.layout.sample_rows()
    return np.concatenate(parts)[rows].astype(COLUMNS[name][0]), np.concatenate(there)[rows]


def _ids_by_row(path: Path, manifest: Manifest, held: NDArray[np.int64], known: Samples) -> NDArray[np.int64]:
    """The id in each row [num_samples]. Those that are damaged follow from the others: the samples of a segment stand
    in `row_order`.
    """
    unique, counts = np.unique(held, return_counts=True)
    good = np.isin(held, unique[counts == 1]) & np.isin(held, known.ids)
    if good.all():
        return held
    lost = np.setdiff1d(known.ids, held[good])
    segments = np.repeat(np.arange(len(manifest.layout.segments)), manifest.layout.segments)
    concerned = np.unique(segments[~good])
    if len(lost) == np.count_nonzero(~good) and len(concerned) == 1:
        here = segments == concerned[0]
        members = np.concatenate([held[good & here], lost])
        ids = held.copy()
        ids[here] = members[row_order(members, int(manifest.identity.views["seed"]))]
        if np.array_equal(ids[good], held[good]):
            return ids
    raise StoreError(
        f"the sample ids of {path} are damaged, and this recipe's data set does not tell which were there: use the "
        f"recipe that made it, or else it {HOPELESS}."
    )


def _contradicts(held: Mapping[str, tuple[NDArray[Any], NDArray[np.bool_]]], samples: Samples) -> bool:
    """Whether label and pixels of a row both say that another sample stood there: then the rows have another order."""
    labels, pixels = held["labels"], held["pixels_crc32c"]
    wrong_label, wrong_pixels = labels[0] != samples.labels, pixels[0] != samples.pixels_crc32c
    return bool((wrong_label & labels[1] & wrong_pixels & pixels[1]).any())
