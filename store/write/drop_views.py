"""Making a store smaller in place: the first views stay, the files of the others are deleted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from store.write.claims import holder
from store.fs.atomic_write import fsync_path
from store.errors import KdpipeError, StoreError
from store.fs.lock import LockedError
from store.format.manifest import Manifest
from store.format.markers import MARKERS
from store.write.writer import exclusive_store
from store.format.zarr_metadata import read_store_manifest, replace_metadata


def drop_views(path: Path, keep: int) -> dict[str, Any]:
    """Keep the first `keep` views of the store at `path`; returns the counts of views and the bytes freed.

    The manifest is changed first, then the arrays' metadata, then markers go and then shards: killed at any moment,
    this leaves a whole store with files that nobody reads, and the same call deletes the rest of them. A reader that
    has mapped a removed view keeps it until it lets go. Views may be added again later.

    Raises StoreError where the store has fewer views or cannot be changed, LockedError naming who is at one of the
    views to be removed.
    """
    manifest = read_store_manifest(path)
    num_views = manifest.layout.num_views
    if not 1 <= keep <= num_views:
        raise StoreError(f"{path} has {num_views} views: keep from 1 to {num_views} of them, not {keep}.")
    if not os.access(path, os.W_OK):
        raise _refused(path, "it is read-only")
    with exclusive_store(path):
        manifest = read_store_manifest(path)  # again: it may have changed until the lock was ours
        _require_nobody_at(path, manifest, keep)
        num_views = manifest.layout.num_views
        keep = min(keep, num_views)
        try:
            replace_metadata(path, _with_views(manifest, keep), group_first=True)
            freed = sum(_delete(folder) for folder in _removed(path, manifest, keep))
        except OSError as error:
            raise _refused(path, f"{error.strerror}: {error.filename}") from error
    return {
        "path": str(path),
        "num_views": keep,
        "num_views_removed": num_views - keep,
        "bytes_freed": freed,
    }


def _with_views(manifest: Manifest, keep: int) -> Manifest:
    finished = manifest.finished
    return replace(
        manifest,
        layout=replace(manifest.layout, num_views=keep),
        finished=finished and replace(finished, num_views=min(finished.num_views, keep)),
    )


def _require_nobody_at(path: Path, manifest: Manifest, keep: int) -> None:
    for unit in manifest.layout.units(range(keep, manifest.layout.num_views)):
        if at_it := holder(path, unit.key):
            raise LockedError(f"{unit} of {path} is being computed by {at_it}: stop that job, or wait for it.")


def _removed(path: Path, manifest: Manifest, keep: int) -> Iterator[Path]:
    """What lies on disk of the views from `keep` on: their markers first, then their shards."""
    for name in (MARKERS, *[spec.name for spec in manifest.arrays]):
        chunks = path / name / "c"
        inside = [one.name for one in chunks.iterdir()] if chunks.is_dir() else []
        views = sorted(int(one) for one in inside if one.isdecimal() and one.isascii())
        yield from (chunks / str(view) for view in views if view >= keep)


def _delete(folder: Path) -> int:
    """Delete a view's folder, durably; returns how many bytes of files were in it. A link goes exclusive_store."""
    if folder.is_symlink():
        freed = 0
        folder.unlink()
    else:
        freed = sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
        shutil.rmtree(folder)
    fsync_path(folder.parent)
    return freed


def _refused(path: Path, why: str) -> KdpipeError:
    return StoreError(
        f"{path} cannot be made smaller: {why}. What is left is a whole store; mend that and run it again."
    )
