"""Shrink a store in place: keep the first views and delete the files of the others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdpipe.store.errors import StoreError, translate_os_errors
from kdpipe.store.format.manifest import Manifest
from kdpipe.store.format.schema import MARKERS
from kdpipe.store.format.zarr_metadata import read_store_manifest, replace_metadata
from kdpipe.store.fs.atomic_write import fsync_path
from kdpipe.store.fs.lock import LockedError
from kdpipe.store.write.claims import exclusive_store, holder


def drop_views(path: Path, keep: int) -> dict[str, Any]:
    """Keep the first `keep` views of the store at `path`. Returns the numbers of views and the bytes freed.

    The manifest is changed first, then the arrays' metadata; then markers are deleted and then shards. A kill at any
    moment leaves a valid store with unused files, which the same call deletes. Mapped views can still be read.

    Raises:
        StoreError: The store has fewer views or cannot be changed.
        LockedError: A view to be dropped is being computed; the error names the holder.
    """
    manifest = read_store_manifest(path)
    num_views = manifest.layout.num_views
    if not 1 <= keep <= num_views:
        raise StoreError(f"{path} has {num_views} views: keep from 1 to {num_views} of them, not {keep}.")
    if not os.access(path, os.W_OK):
        raise StoreError(_failure(path, "it is read-only"))
    with exclusive_store(path):
        manifest = read_store_manifest(path)  # again: it may have changed before the lock was acquired
        num_views, finished = manifest.layout.num_views, manifest.finished
        keep = min(keep, num_views)
        for unit in manifest.layout.units(range(keep, num_views)):
            if found := holder(path, unit.key):
                raise LockedError(f"{unit} of {path} is being computed by {found}: stop that job, or wait for it.")
        kept = replace(
            manifest,
            layout=replace(manifest.layout, num_views=keep),
            finished=finished and replace(finished, num_views=min(finished.num_views, keep)),
        )
        with translate_os_errors(lambda error: _failure(path, f"{error.strerror}: {error.filename}")):
            replace_metadata(path, kept, group_first=True)
            freed = sum(_delete(folder) for folder in _dropped(path, manifest, keep))
    return {"path": str(path), "num_views": keep, "num_views_removed": num_views - keep, "bytes_freed": freed}


def _dropped(path: Path, manifest: Manifest, keep: int) -> Iterator[Path]:
    """Yield the folders of the views from `keep` on: their markers first, then their shards."""
    for name in (MARKERS, *[spec.name for spec in manifest.arrays]):
        chunks = path / name / "c"
        entries = [entry.name for entry in chunks.iterdir()] if chunks.is_dir() else []
        views = sorted(int(entry) for entry in entries if entry.isdecimal() and entry.isascii())
        yield from (chunks / str(view) for view in views if view >= keep)


def _delete(folder: Path) -> int:
    """Delete a view's folder, durably, and return the bytes of its files. Links are not followed."""
    if folder.is_symlink():
        freed = 0
        folder.unlink()
    else:
        freed = sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
        shutil.rmtree(folder)
    fsync_path(folder.parent)
    return freed


def _failure(path: Path, reason: str) -> str:
    return f"cannot drop views of {path}: {reason}. The store is still valid. Fix the problem and run it again."
