"""Cache of staged stores, shared by this machine's jobs: the least recently used one that is not in use is evicted.

An entry is a folder `{fingerprint}-{digest}` with the copy, `targets.zarr`, and its lock files. A reader of the copy
holds a shared lock on the entry's `in-use`, which the kernel drops with the process; evicting it needs that lock
exclusively.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kdpipe.store.errors import StoreError
from kdpipe.store.format.manifest import Manifest
from kdpipe.store.format.samples import CHUNK_ROWS, COLUMNS, column_dtype
from kdpipe.store.format.schema import MARKER_BYTES
from kdpipe.store.format.unit_state import store_bytes
from kdpipe.store.format.zarr_metadata import read_store_manifest
from kdpipe.store.fs.atomic_write import PARTIAL_SUFFIX, fsync_path
from kdpipe.store.fs.lock import Holder, acquire, exclusive, is_file_at, release

DEFAULT_MAX_BYTES = 200 * 2**30

COPY = "targets.zarr"
IN_USE = "in-use"

ENTRY = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")
LEFTOVER = re.compile(rf"\.{ENTRY.pattern}\.[0-9a-f]{{8}}{re.escape(PARTIAL_SUFFIX)}")
"""Only folders of these names are ever removed: the user may choose a folder with other contents."""


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
    """Hold the lock for reserving and freeing space; waits for it, as it is held briefly."""
    return exclusive(cache.folder, cache.folder / ".area.lock", wait=True)


@contextmanager
def using(entry: Path) -> Iterator[None]:
    """Protect `entry` from eviction inside the block, and mark it as used now. Waits for an eviction to end."""
    descriptor = _share(entry)
    try:
        os.utime(descriptor)
        yield
    finally:
        release(descriptor)


_kept: dict[Path, int] = {}
_keeping = threading.Lock()


def keep(entry: Path) -> None:
    """Protect `entry` from eviction while this process lives."""
    with _keeping:
        if entry not in _kept or not is_file_at(entry / IN_USE, _kept[entry]):  # or removed by hand since
            _kept[entry] = _share(entry)


def copy_bytes(manifest: Manifest) -> int:
    """Return the bytes of a zero-copy store on disk, except for some kilobytes of metadata."""
    units, num_chunks = manifest.layout.units(), -(-manifest.layout.num_rows // CHUNK_ROWS)
    sample_bytes = num_chunks * CHUNK_ROWS * sum(column_dtype(name).itemsize for name in COLUMNS)
    head_bytes = manifest.head.num_bytes if manifest.head else 0
    return store_bytes(manifest, units) + len(units) * MARKER_BYTES + sample_bytes + head_bytes


def make_room(cache: StagingCache, entry: Path, planned_bytes: int) -> None:
    """Evict entries, the least recently used first, until `entry` may grow to `planned_bytes`.

    The caller holds `exclusive_cache` and uses `entry`. Raises StoreError, and evicts nothing, where it cannot fit.
    """
    _sweep(cache)
    sizes = {folder: _final_bytes(folder) for folder in _folders(cache) if folder != entry}
    room, free = cache.max_bytes - sum(sizes.values()), shutil.disk_usage(cache.folder).free
    new_bytes = planned_bytes - _folder_bytes(entry)
    evicted, in_use = [], []
    with ExitStack() as locks:
        for folder in sorted(sizes, key=_last_used):
            if planned_bytes <= room and new_bytes <= free:
                break
            acquired = acquire(folder / IN_USE, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if isinstance(acquired, Holder):
                in_use.append(f"{folder.name} ({acquired})")
                continue
            locks.callback(release, acquired)
            evicted.append(folder)
            room, free = room + sizes[folder], free + _folder_bytes(folder)
        if planned_bytes > room or new_bytes > free:
            users = f" In use, and not to be evicted: {', '.join(in_use)}." if in_use else ""
            raise StoreError(
                f"the store needs {planned_bytes:,} bytes in {cache.folder}, where staged stores may take "
                f"{cache.max_bytes:,} together and the disk has {free:,} free: make room, set KDPIPE_CACHE_BYTES "
                f"higher, or KDPIPE_CACHE to a folder on another disk.{users}"
            )
        aside = [_set_aside(folder) for folder in evicted]
    for folder in aside:
        shutil.rmtree(folder, ignore_errors=True)  # the rest is removed by a later sweep


def _final_bytes(folder: Path) -> int:
    """Return the size of an entry once it is complete."""
    try:
        return copy_bytes(read_store_manifest(folder / COPY))
    except StoreError:
        return _folder_bytes(folder)


def _last_used(folder: Path) -> int:
    in_use = folder / IN_USE
    return in_use.stat().st_mtime_ns if in_use.exists() else 0


def _share(entry: Path) -> int:
    acquired = acquire(entry / IN_USE, fcntl.LOCK_SH)
    assert isinstance(acquired, int), "a lock that is waited for is never refused"
    return acquired


def _set_aside(folder: Path) -> Path:
    """Rename an entry out of the cache in one step, so that a crash during its removal leaves no partial entry."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")
    folder.rename(aside)
    fsync_path(folder.parent)
    return aside


def _sweep(cache: StagingCache) -> None:
    """Remove what killed evictions had set aside."""
    for path in cache.folder.iterdir():
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _folders(cache: StagingCache) -> list[Path]:
    return [path for path in cache.folder.iterdir() if ENTRY.fullmatch(path.name) and not path.is_symlink()]


def _folder_bytes(folder: Path) -> int:
    total = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # another job is filling this entry and renames its files
                total += os.lstat(Path(inside, name)).st_size
    return total
