"""List the target stores below a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdpipe.pipeline.commands.store.info import model_name, read_store_info
from kdpipe.pipeline.terminal.output import printable
from kdpipe.store import KdpipeError, StoreError, read_store_manifest
from kdpipe.store.format.schema import MARKERS, SAMPLES

MAX_DEPTH = 8


def list_stores(folder: Path) -> list[dict[str, Any]]:
    """Return what `store info` shows of each store below `folder`, or `folder` itself, sorted by path.

    `fault` is None, or why the store cannot be read: then only `path` is there, too. Links and hidden folders are not
    followed, nor anything deeper than `MAX_DEPTH` folders.

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
        return {"fault": None, **read_store_info(path)}
    except (KdpipeError, OSError) as error:
        return {"path": str(path), "fault": str(error)}


def _line(store: dict[str, Any]) -> str:
    if store["fault"]:
        return f"broken: {store['fault']}"
    teacher, data = store["teacher"], store["data"]
    return (
        f"{model_name(teacher)} ({str(teacher.get('weights_sha256'))[:8]}) on {data.get('name')} "
        f"{data.get('split') or ''}".rstrip()
        + f", {store['num_views']} views of {store['num_samples']:,} samples, "
        f"{', '.join(store['arrays'])}, {store['disk_bytes']:,} bytes, "
        f"{store['num_units_done']} of {store['num_units']} units done, {store['profile']}"
    )
