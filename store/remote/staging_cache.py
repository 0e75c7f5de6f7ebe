"""Cache of staged stores, shared by this machine's jobs. Nothing is evicted: a user deletes copies of no more use.

An entry is a folder `{fingerprint}-{digest}` with the copy, `targets.zarr`, and its lock file.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from kdpipe.store.errors import StoreError
from kdpipe.store.format.manifest import Manifest
from kdpipe.store.format.samples import CHUNK_ROWS, COLUMNS, column_dtype
from kdpipe.store.format.schema import MARKER_BYTES
from kdpipe.store.format.unit_state import store_bytes
from kdpipe.store.format.zarr_metadata import read_store_manifest
from kdpipe.store.fs.lock import exclusive

DEFAULT_MAX_BYTES = 200 * 2**30

COPY = "targets.zarr"
ENTRY = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")


@dataclass(frozen=True)
class StagingCache:
    """A folder of staged stores and the bytes that they may take together."""

    folder: Path
    max_bytes: int


def default_staging_cache(environ: Mapping[str, str]) -> StagingCache:
    """Return the cache at KDPIPE_CACHE, or in the user's cache folder; of KDPIPE_CACHE_BYTES, or 200 GiB.

    Raises StoreError where KDPIPE_CACHE_BYTES is not a number of bytes.
    """
    text = environ.get("KDPIPE_CACHE_BYTES") or str(DEFAULT_MAX_BYTES)
    if not re.fullmatch("[0-9]{1,18}", text):
        raise StoreError(
            f"KDPIPE_CACHE_BYTES is {text[:40]!r}: set it to the bytes that staged stores may take, such as "
            f"{DEFAULT_MAX_BYTES} for 200 GiB."
        )
    if named := environ.get("KDPIPE_CACHE"):
        return StagingCache(Path(named).expanduser().absolute(), int(text))
    base = Path(environ.get("XDG_CACHE_HOME") or "")
    if not base.is_absolute():  # the XDG specification ignores relative ones
        base = Path(environ.get("HOME") or Path.home()) / ".cache"
    return StagingCache(base / "kdpipe" / "stores", int(text))


def exclusive_cache(cache: StagingCache) -> AbstractContextManager[None]:
    """Hold the lock for reserving space; waits for it, as it is held briefly."""
    return exclusive(cache.folder, cache.folder / ".area.lock", wait=True)


def require_room(cache: StagingCache, entry: Path, copy: Manifest) -> None:
    """Raise StoreError unless the cache and its disk have room for a `copy` in `entry`.

    The caller holds `exclusive_cache` until the entry's manifest records its size.
    """
    others = [path for path in cache.folder.iterdir() if ENTRY.fullmatch(path.name) and path != entry]
    room = cache.max_bytes - sum(map(_final_bytes, others))
    planned_bytes, free = _copy_bytes(copy), shutil.disk_usage(cache.folder).free
    if planned_bytes > room or planned_bytes - _folder_bytes(entry) > free:
        raise StoreError(
            f"the store needs {planned_bytes:,} bytes in {cache.folder}, where staged stores may take "
            f"{cache.max_bytes:,} together, others leave {max(room, 0):,}, and the disk has {free:,} free: delete what "
            "is no longer used there, set KDPIPE_CACHE_BYTES higher, or KDPIPE_CACHE to a folder on another disk."
        )


def _copy_bytes(manifest: Manifest) -> int:
    """Return the bytes of a zero-copy store on disk, except for some kilobytes of metadata."""
    units, num_chunks = manifest.layout.units(), -(-manifest.layout.num_rows // CHUNK_ROWS)
    sample_bytes = num_chunks * CHUNK_ROWS * sum(column_dtype(name).itemsize for name in COLUMNS)
    return store_bytes(manifest, units) + len(units) * MARKER_BYTES + sample_bytes


def _final_bytes(entry: Path) -> int:
    """Return the size of an entry once it is complete."""
    try:
        return _copy_bytes(read_store_manifest(entry / COPY))
    except StoreError:
        return _folder_bytes(entry)


def _folder_bytes(folder: Path) -> int:
    total = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # another job is filling this entry and renames its files
                total += os.lstat(Path(inside, name)).st_size
    return total
