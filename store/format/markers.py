"""Commit markers: the only definition of a unit being done.

They are stored in the array `markers`, uint8 [V, S, MARKER_BYTES]: each of its chunks is one file with a JSON text,
padded with spaces, so that plain Zarr tools see a valid group and a remote reader needs only Zarr. A unit without a
marker reads as zeros there, and is missing. The text is canonical and carries its own crc32c, so that a flipped bit
anywhere in the file is found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdpipe.store.errors import StoreError
from kdpipe.store.format.identity import canonical_json
from kdpipe.store.format.layout import Unit
from kdpipe.store.format.manifest import Manifest
from kdpipe.store.format.schema import MARKER_BYTES, MARKERS
from kdpipe.store.format.shard import crc32c
from kdpipe.store.fs.atomic_write import fsync_path, write_atomically
from kdpipe.store.fs.safe_read import read_regular_file

CHECKSUM = "crc32c"
"""Key of a marker's own checksum, over its canonical text without this key."""

MAX_FILE_BYTES = 2**62
"""Maximum plausible file size: a marker that states more is damaged."""


@dataclass(frozen=True)
class Marker:
    """Committed files of a unit.

    Attributes:
        files: By array, the `bytes` and `crc32c` of its shard file.
        fidelity: By array, the error of its encoding.
    """

    files: Mapping[str, Mapping[str, int]]
    fidelity: Mapping[str, Any] = field(default_factory=dict)


def marker_key(unit: Unit) -> str:
    return f"{MARKERS}/c/{unit.view}/{unit.shard}/0"


def marker_path(store: Path, unit: Unit) -> Path:
    return store / marker_key(unit)


def write_marker(store: Path, manifest: Manifest, unit: Unit, marker: Marker) -> None:
    """Publish that `unit` is done. Raises StoreError where the marker has no room for so many arrays."""
    text = marker_text(manifest, unit, marker)
    if len(text) > MARKER_BYTES:
        raise StoreError(
            f"{store} has no room for so many arrays: the marker of {unit} needs {len(text):,} bytes and may have "
            f"{MARKER_BYTES:,}. Store further layers in another store."
        )
    write_atomically(marker_path(store, unit), text.ljust(MARKER_BYTES))


def marker_text(manifest: Manifest, unit: Unit, marker: Marker) -> bytes:
    """Return the canonical text of a marker, not padded."""
    return _text(
        {
            "fingerprint": _fingerprint(manifest, unit),
            "rows": unit.num_rows,
            "files": marker.files,
            "fidelity": marker.fidelity,
        }
    )


def remove_marker(store: Path, unit: Unit) -> None:
    """Revoke that `unit` is done, durably."""
    path = marker_path(store, unit)
    path.unlink(missing_ok=True)
    if path.parent.exists():
        fsync_path(path.parent)


def read_marker(store: Path, manifest: Manifest, unit: Unit) -> Marker | None:
    """Return the marker of `unit`, None where it is not done. Raises StoreError if damaged or of another store."""
    path = marker_path(store, unit)
    try:
        raw = read_regular_file(path, MARKER_BYTES, store)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"the marker {path} cannot be read ({error.strerror}).") from error
    return parse_marker(raw, manifest, unit, str(path))


def parse_marker(raw: bytes, manifest: Manifest, unit: Unit, where: str) -> Marker:
    """Parse a marker's bytes. Raises StoreError where it is damaged or belongs to another store."""
    try:
        record = checked_record(raw)
        marker = _parse(record)
        fingerprint, rows = str(record["fingerprint"]), int(record["rows"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise StoreError(
            f"the marker {where} is damaged: `kdpipe store repair RECIPE` computes its unit again."
        ) from error
    wanted = _fingerprint(manifest, unit)
    if fingerprint != wanted or rows != unit.num_rows:
        raise StoreError(
            f"the marker {where} belongs to another store (fingerprint {fingerprint[:64]!r}, wanted {wanted}; "
            f"{rows} rows, wanted {unit.num_rows}): `kdpipe store repair RECIPE` computes its unit again."
        )
    return marker


def checked_record(raw: bytes) -> dict[str, Any]:
    """Return the record in a marker's bytes. Raises ValueError and others where it is damaged."""
    record = {key: value for key, value in json.loads(raw).items() if key != CHECKSUM}
    if raw != _text(record).ljust(MARKER_BYTES):
        raise ValueError("its checksum differs")
    return record


def _fingerprint(manifest: Manifest, unit: Unit) -> str:
    return manifest.segment_fingerprints[manifest.layout.segment_of(unit.shard)]


def _text(record: Mapping[str, Any]) -> bytes:
    """Return the canonical text of a record, its checksum included."""
    return canonical_json({**record, CHECKSUM: crc32c(canonical_json(record).encode())}).encode()


def _parse(record: Mapping[str, Any]) -> Marker:
    files = {}
    for name, file in record["files"].items():
        num_bytes, checksum = file["bytes"], file["crc32c"]
        if type(num_bytes) is not int or type(checksum) is not int:
            raise TypeError(f"the file of {name} is {file}")
        if not (0 <= num_bytes < MAX_FILE_BYTES and 0 <= checksum < 2**32):
            raise ValueError(f"the file of {name} is {file}")
        files[str(name)] = {"bytes": num_bytes, "crc32c": checksum}
    return Marker(files, dict(record["fidelity"]))
