"""List the target stores below a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.commands.store.info import fill_state, model_name
from pipeline.terminal.output import printable
from store import KdpipeError, StoreError, read_store_manifest
from store.markers import MARKERS
from store.samples import SAMPLES

MAX_DEPTH = 8


def list_stores(folder: Path) -> list[dict[str, Any]]:
    """Return the properties of each store below `folder`, or `folder` itself, sorted by path.

    `fault` is None, or why the store cannot be read; a broken store has no other properties. Links and hidden folders
    are not followed, nor anything deeper than `MAX_DEPTH` folders.

    Raises:
        KdpipeError: If there is no such folder.
    """
    if not folder.is_dir():
        raise KdpipeError(f"{folder} is not a folder: name one that contains stores.")
    return [_entry(path) for path in _stores(folder, MAX_DEPTH)]


def print_stores(stores: list[dict[str, Any]]) -> None:
    """Print one line per store to stdout."""
    for store in stores:
        print(printable(f"{store['path']}: {_line(store)}"))  # noqa: T201


def _stores(folder: Path, depth: int) -> Iterator[Path]:
    has_parts = _has_parts(folder)
    if has_parts or (folder / "zarr.json").exists():
        if has_parts or _is_readable(folder):  # skip other Zarr groups
            yield folder
        return
    try:
        inside = sorted(child for child in folder.iterdir() if child.is_dir() and not child.is_symlink())
    except OSError:
        return
    for child in inside if depth else ():
        if not child.name.startswith("."):
            yield from _stores(child, depth - 1)


def _has_parts(folder: Path) -> bool:
    """Return whether a folder looks like a store even if its manifest is damaged."""
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
        state = fill_state(path, manifest)
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
        "disk_bytes": state.num_bytes,
        "num_units": state.num_units,
        "num_units_done": state.num_units - len(state.missing),
        "is_finished": manifest.finished is not None and not state.missing,
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
