"""One target store in `kdpipe status`, by its manifest and markers: without numpy and Zarr, which `store info` has."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.status.files import Budget, Measure, measure, number, read_object, text
from store.errors import KdpipeError
from store.format.schema import ATTRIBUTE, MARKERS, SCHEMA_VERSION
from store.fs.safe_read import read_regular_file
from store.write.claims import holder

MOST_COUNTED = 20_000
"""Of a store with more units the markers are not counted where its manifest calls them finished."""

MOST_MARKER_BYTES = 64 * 1024
MOST_CLAIMS = 100


@dataclass(frozen=True)
class StoreStatus:
    """A target store. state: finished, being filled, unfinished, damaged, or another schema
    (of an older kdpipe, or a newer one); at_work: who is at which unit;
    last_sign: seconds since 1970.
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
    """What the store in `folder` says of itself; None where it is no kdpipe store, {} where that is damaged."""
    if "zarr.json" not in names:
        return None
    group = read_object(folder / "zarr.json")
    attributes = group.get("attributes") if group else None
    manifest = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    if isinstance(manifest, dict):
        return manifest
    return {} if {MARKERS, "samples"} <= names else None


def store_status(folder: Path, manifest: Mapping[str, Any], budget: Budget) -> StoreStatus:
    """What is to be known of the store in `folder`."""
    held = measure(folder, budget, Measure())
    teacher, data = _section(manifest, "teacher"), _section(manifest, "data")
    views, shards, samples = _geometry(manifest)
    done = _num_done(folder, manifest, views, shards)
    at_work = _at_work(folder, budget)
    whole = _is_all_finished(manifest) and done == views * shards > 0
    odd = "damaged" if manifest.get("schema_version") in (SCHEMA_VERSION, None) else "another schema"
    state = "finished" if whole else "being filled" if at_work else "unfinished" if views * shards else odd
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
        last_sign=held.newest,
        disk_bytes=held.num_bytes,
    )


def _section(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def _geometry(manifest: Mapping[str, Any]) -> tuple[int, int, int]:
    """Views, shards of a view, and samples; zeros where the manifest is damaged."""
    views, rows, segments = (
        number(manifest.get("num_views")),
        number(manifest.get("unit_rows")),
        manifest.get("segments"),
    )
    counts = (
        [number(one.get("num_samples")) if isinstance(one, dict) else None for one in segments or ()]
        if isinstance(segments, list)
        else [None]
    )
    if not views or not rows or not counts or None in counts:
        return 0, 0, 0
    known = [count for count in counts if count]
    return views, sum(-(-count // rows) for count in known), sum(known)


def _is_all_finished(manifest: Mapping[str, Any]) -> bool:
    """Whether readers see all that the manifest lists: no extension is under way."""
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
    """How many units have a marker, and one that lists all arrays where some are being added."""
    finished = _is_all_finished(manifest)
    if finished and views * shards > MOST_COUNTED:
        return views * shards
    added = set() if finished else set(_names(manifest))
    if not _section(manifest, "finished"):
        added = set()  # the first filling: every marker lists them all
    counted = 0
    for view in _numbered(folder / MARKERS / "c", views):
        for shard in _numbered(Path(view), shards):
            marker = Path(shard, "0")
            counted += _lists_all(marker, added) if added else marker.exists()
    return counted


def _numbered(folder: Path, count: int) -> list[str]:
    """The entries of a folder that are called 0 to count - 1."""
    with suppress(OSError), os.scandir(folder) as inside:
        names = [entry.name for entry in inside if entry.name.isascii() and entry.name.isdecimal()]
        return [str(folder / name) for name in names if str(int(name[:20])) == name and int(name) < count]
    return []


def _lists_all(marker: Path, names: set[str]) -> bool:
    try:
        files = json.loads(read_regular_file(marker, MOST_MARKER_BYTES))["files"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False
    return isinstance(files, dict) and names <= set(files)


def _at_work(folder: Path, budget: Budget) -> list[str]:
    """Who holds a claim on which unit, beside the store."""
    found = []
    for entry in budget.entries(folder.with_name(f".{folder.name}.locks"), MOST_CLAIMS):
        with suppress(OSError, KdpipeError):
            if at_it := holder(folder, entry.name):
                found.append(f"{text(entry.name)}: {text(str(at_it))}")
    return found
