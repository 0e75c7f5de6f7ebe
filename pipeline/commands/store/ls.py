"""`kdpipe store ls`: the stores below a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.commands.store.info import how_filled, model_name
from pipeline.terminal.output import printable
from store import KdpipeError, StoreError, read_store_manifest
from store.markers import MARKERS
from store.samples import SAMPLES

MOST_DEPTH = 8
"""So many folders below the given one are looked into."""


def list_stores(folder: Path) -> list[dict[str, Any]]:
    """What is to be known of each store below `folder`, or `folder` itself, in the order of their paths.

    `fault` is None, or a sentence on why a store cannot be read: all else of it is then left out. Links are not
    followed, hidden folders not looked into. Raises KdpipeError where there is no such folder.
    """
    if not folder.is_dir():
        raise KdpipeError(f"{folder} is not a folder: name one in which stores lie.")
    return [_entry(path) for path in _stores(folder, MOST_DEPTH)]


def print_stores(stores: list[dict[str, Any]]) -> None:
    """For people, on stdout, a line each."""
    for store in stores:
        print(printable(f"{store['path']}: {_line(store)}"))  # noqa: T201


def _stores(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "zarr.json").exists() or _looks_like_one(folder):
        if _looks_like_one(folder) or _is_readable(folder):  # any other Zarr group is somebody else's
            yield folder
        return
    try:
        inside = sorted(one for one in folder.iterdir() if one.is_dir() and not one.is_symlink())
    except OSError:  # not ours to look into
        return
    for one in inside if depth else ():
        if not one.name.startswith("."):
            yield from _stores(one, depth - 1)


def _looks_like_one(folder: Path) -> bool:
    """Whether a folder is a store even if its manifest says nothing any more."""
    return (folder / MARKERS).is_dir() and (folder / SAMPLES).is_dir()


def _is_readable(folder: Path) -> bool:
    try:
        read_store_manifest(folder)
    except StoreError:
        return False
    return True


def _entry(path: Path) -> dict[str, Any]:
    try:
        manifest = read_store_manifest(path)
        filled = how_filled(path, manifest)
    except (KdpipeError, OSError) as error:
        return {"path": str(path), "fault": str(error)}
    teacher, data, geometry = manifest.identity.teacher, manifest.identity.data, manifest.geometry
    return {
        "path": str(path),
        "fault": None,
        "fingerprint": manifest.identity.fingerprint,
        "teacher": model_name(teacher),
        "weights_sha256": teacher.get("weights_sha256"),
        "data": data.get("name"),
        "split": data.get("split"),
        "num_views": geometry.num_views,
        "num_samples": geometry.num_samples,
        "arrays": [spec.name for spec in manifest.arrays],
        "profile": manifest.profile,
        "disk_bytes": filled.num_bytes,
        "num_units": filled.num_units,
        "num_units_done": filled.num_units - len(filled.missing),
        "is_finished": manifest.finished is not None and not filled.missing,
    }


def _line(store: dict[str, Any]) -> str:
    if store["fault"]:
        return f"broken: {store['fault']}"
    teacher = f"{store['teacher']} ({str(store['weights_sha256'])[:8]})"
    data = f"{store['data']} {store['split']}" if store["split"] else store["data"]
    return (
        f"{teacher} on {data}, {store['num_views']} views "
        f"of {store['num_samples']:,} samples, {', '.join(store['arrays'])}, {store['disk_bytes']:,} bytes, "
        f"{store['num_units_done']} of {store['num_units']} units done, {store['profile']}"
    )
