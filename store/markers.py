"""Commit markers: the only definition of a unit being done.

They stand in the store's array `markers`, uint8 [V, S, marker_bytes]: each chunk of it is one file that holds a
JSON text, filled up with spaces, so that plain Zarr tools see nothing foreign in the group and a remote reader
needs nothing but Zarr. A unit without a marker reads as zeros there, and is missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from store.durable import write_atomically
from store.errors import StoreError
from store.geometry import PAGE_BYTES, ArraySpec, Unit
from store.manifest import canonical_json

MARKERS = "markers"


def marker_bytes(specs: Sequence[ArraySpec]) -> int:
    """Room for one marker: a line for each array's file, in whole pages."""
    longest = 512 + sum(len(spec.name.encode("unicode_escape")) + 96 for spec in specs)
    return -(-longest // PAGE_BYTES) * PAGE_BYTES


def marker_path(store: Path, unit: Unit) -> Path:
    return store / MARKERS / "c" / str(unit.view) / str(unit.shard) / "0"


def write_marker(store: Path, unit: Unit, fingerprint: str, files: dict[str, dict[str, int]], size: int) -> None:
    """Publish that `unit` is done. `files` has, by array name, the `bytes` and `crc32c` of its shard file."""
    record = {"fingerprint": fingerprint, "rows": unit.num_rows, "files": files}
    text = canonical_json(record).encode("ascii")
    if len(text) > size:
        raise StoreError(f"the marker of {unit} needs {len(text)} bytes and has room for {size}.")
    write_atomically(marker_path(store, unit), text.ljust(size))


def read_marker(store: Path, unit: Unit, fingerprint: str) -> dict[str, dict[str, int]] | None:
    """The files that `unit` committed, by array name; None where the unit is not done.

    Raises StoreError where the marker is damaged or belongs to another store.
    """
    path = marker_path(store, unit)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    record = _parse(raw, path)
    if record["fingerprint"] != fingerprint or record["rows"] != unit.num_rows:
        raise StoreError(
            f"the marker {path} belongs to another store (fingerprint {record['fingerprint']}, wanted {fingerprint}; "
            f"{record['rows']} rows, wanted {unit.num_rows}): delete the store and cache again."
        )
    files: dict[str, dict[str, int]] = record["files"]
    return files


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(raw)
        files = {
            str(name): {"bytes": int(file["bytes"]), "crc32c": int(file["crc32c"])}
            for name, file in record["files"].items()
        }
        return {"fingerprint": str(record["fingerprint"]), "rows": int(record["rows"]), "files": files}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"the marker {path} is damaged: delete that file, and `kdpipe cache-teacher` computes its unit again."
        ) from error
