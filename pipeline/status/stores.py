"""Determine the status of a target store from its manifest and markers, without numpy and Zarr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.pipeline.status.files import Budget, Measure, measure, number, text
from kdpipe.store.errors import KdpipeError
from kdpipe.store.format.schema import ATTRIBUTE, MARKERS, SAMPLES, SCHEMA_VERSION
from kdpipe.store.fs.safe_read import read_json_or_none, read_regular_file
from kdpipe.store.write.claims import holder

MAX_MARKER_BYTES = 64 * 1024
MAX_CLAIMS = 100


@dataclass(frozen=True)
class StoreStatus:
    """Status of a target store.

    Attributes:
        state: finished, being filled, unfinished, damaged, or another schema (of another version of kdpipe).
        at_work: Units being computed, with the process.
        last_sign: Time of the last activity, in seconds since 1970.
    """

    path: str
    state: str
    teacher: str
    data: str
    num_views: int
    num_samples: int
    num_units: int
    num_units_done: int
    at_work: list[str]
    last_sign: float
    disk_bytes: int


def manifest_of(folder: Path, names: set[str]) -> dict[str, Any] | None:
    """Return the manifest of the store in `folder`: None if it is no kdpipe store, {} if the manifest is damaged."""
    if "zarr.json" not in names:
        return None
    group = read_json_or_none(folder / "zarr.json")
    attributes = group.get("attributes") if group else None
    manifest = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    if isinstance(manifest, dict):
        return manifest
    return {} if {MARKERS, SAMPLES} <= names else None


def store_status(folder: Path, manifest: Mapping[str, Any], budget: Budget) -> StoreStatus:
    """Return the status of the store in `folder`."""
    size = measure(folder, budget, Measure())
    teacher, data = _section(manifest, "teacher"), _section(manifest, "data")
    views, shards, samples = _counts(manifest)
    done = _num_done(folder, manifest, views, shards)
    at_work = _at_work(folder, budget)
    is_finished = _is_all_finished(manifest) and done == views * shards > 0
    unknown = "damaged" if manifest.get("schema_version") in (SCHEMA_VERSION, None) else "another schema"
    state = "finished" if is_finished else "being filled" if at_work else "unfinished" if views * shards else unknown
    return StoreStatus(
        path=str(folder),
        state=state,
        teacher=text(_section(teacher, "architecture").get("model")) or "unknown",
        data=text(data.get("name")),
        num_views=views,
        num_samples=samples,
        num_units=views * shards,
        num_units_done=done,
        at_work=at_work,
        last_sign=size.newest,
        disk_bytes=size.num_bytes,
    )


def _section(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def _counts(manifest: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the numbers of views, shards per view, and samples; zeros if the manifest is damaged."""
    views, rows = number(manifest.get("num_views")), number(manifest.get("unit_rows"))
    segments = manifest.get("segments")
    items = segments if isinstance(segments, list) else [None]
    counts = [number(item.get("num_samples")) if isinstance(item, dict) else None for item in items]
    if not views or not rows or not counts or None in counts:
        return 0, 0, 0
    known = [count for count in counts if count]
    return views, sum(-(-count // rows) for count in known), sum(known)


def _is_all_finished(manifest: Mapping[str, Any]) -> bool:
    """Return whether readers see all that the manifest lists: no extension is in progress."""
    finished, segments = _section(manifest, "finished"), manifest.get("segments")
    return isinstance(segments, list) and (
        finished.get("num_views") == manifest.get("num_views")
        and finished.get("num_segments") == len(segments)
        and set(_names(finished)) == set(_names(manifest))
    )


def _names(record: Mapping[str, Any]) -> list[str]:
    arrays = record.get("arrays")
    return [str(name) for name in arrays] if isinstance(arrays, list | dict) else []


def _num_done(folder: Path, manifest: Mapping[str, Any], views: int, shards: int) -> int:
    """Count the units with a marker, which must list all arrays if some are being added."""
    finished = _section(manifest, "finished")
    added = set(_names(manifest)) - set(_names(finished)) if finished else set()
    markers = [
        marker
        for marker in folder.glob(f"{MARKERS}/c/*/*/0")
        if _is_index(marker.parts[-3], views) and _is_index(marker.parts[-2], shards)
    ]
    return sum(_lists_all(marker, added) for marker in markers) if added else len(markers)


def _is_index(name: str, count: int) -> bool:
    return name.isascii() and name.isdecimal() and len(name) <= 15 and int(name) < count


def _lists_all(marker: Path, names: set[str]) -> bool:
    try:
        files = json.loads(read_regular_file(marker, MAX_MARKER_BYTES))["files"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False
    return isinstance(files, dict) and names <= set(files)


def _at_work(folder: Path, budget: Budget) -> list[str]:
    """Return the claimed units, each with the process that has the claim."""
    found = []
    for entry in budget.entries(folder.with_name(f".{folder.name}.locks"), MAX_CLAIMS):
        with suppress(OSError, KdpipeError):
            if worker := holder(folder, entry.name):
                found.append(f"{text(entry.name)}: {text(str(worker))}")
    return found
