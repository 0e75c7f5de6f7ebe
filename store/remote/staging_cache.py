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
from collections.abc import Iterator, Mapping, Sequence
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
STAGING = "staging.lock"

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
        before = _kept.get(entry)
        if before is not None and is_file_at(entry / IN_USE, before):
            return
        _kept[entry] = _share(entry)
        if before is not None:  # the folder was removed by hand
            release(before)


def copy_bytes(manifest: Manifest) -> int:
    """Return the bytes of a zero-copy store on disk, except for some kilobytes of metadata."""
    units, num_chunks = manifest.layout.units(), -(-manifest.layout.num_rows // CHUNK_ROWS)
    sample_bytes = num_chunks * CHUNK_ROWS * sum(column_dtype(name).itemsize for name in COLUMNS)
    return store_bytes(manifest, units) + len(units) * MARKER_BYTES + sample_bytes


def make_room(cache: StagingCache, entry: Path, planned_bytes: int) -> None:
    """Evict entries, the least recently used first, until `entry` may grow to `planned_bytes`.

    The caller holds `exclusive_cache` and uses `entry`.

    Raises:
        StoreError: It cannot fit within the cache's limit or on its disk. Nothing is evicted then.
    """
    _sweep(cache)
    others = [_Entry.at(folder) for folder in _folders(cache) if folder != entry]
    new_bytes = planned_bytes - _folder_bytes(entry)
    evicted: list[_Entry] = []
    in_use: dict[_Entry, Holder] = {}
    with ExitStack() as locks:
        for other in sorted(others, key=lambda other: other.last_used):
            if not _shortage(cache, planned_bytes, new_bytes, others, evicted):
                break
            acquired = acquire(other.folder / IN_USE, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if isinstance(acquired, Holder):
                in_use[other] = acquired
            else:
                locks.callback(release, acquired)
                evicted.append(other)
        if shortage := _shortage(cache, planned_bytes, new_bytes, others, evicted):
            raise StoreError(shortage + _users(in_use))
        aside = [_set_aside(other.folder) for other in evicted]
    for folder in aside:
        shutil.rmtree(folder, ignore_errors=True)  # the rest is removed by a later sweep


@dataclass(frozen=True)
class _Entry:
    """An entry: its final size, its size on disk, and when it was last used (ns)."""

    folder: Path
    reserved_bytes: int
    disk_bytes: int
    last_used: int

    @staticmethod
    def at(folder: Path) -> _Entry:
        disk_bytes, in_use = _folder_bytes(folder), folder / IN_USE
        try:
            reserved = copy_bytes(read_store_manifest(folder / COPY))
        except StoreError:
            reserved = disk_bytes
        return _Entry(folder, reserved, disk_bytes, in_use.stat().st_mtime_ns if in_use.exists() else 0)


def _shortage(
    cache: StagingCache, planned_bytes: int, new_bytes: int, others: Sequence[_Entry], evicted: Sequence[_Entry]
) -> str | None:
    """Return why an entry would not fit even without those `evicted`; None where it would."""
    reserved = sum(other.reserved_bytes for other in others if other not in evicted)
    free = shutil.disk_usage(cache.folder).free + sum(other.disk_bytes for other in evicted)
    if planned_bytes + reserved > cache.max_bytes:
        return (
            f"the store needs {planned_bytes:,} bytes in {cache.folder}, where staged stores may take "
            f"{cache.max_bytes:,} together: set KDPIPE_CACHE_BYTES higher, or KDPIPE_CACHE to a folder on another disk."
        )
    if new_bytes > free:
        return (
            f"the store needs {new_bytes:,} bytes more in {cache.folder}, whose disk has {free:,} free: make room, or "
            "set KDPIPE_CACHE to a folder on another disk."
        )
    return None


def _users(in_use: Mapping[_Entry, Holder]) -> str:
    if not in_use:
        return ""
    users = ", ".join(f"{other.folder.name} ({who})" for other, who in in_use.items())
    total = sum(other.reserved_bytes for other in in_use)
    return f" In use, and not to be evicted, are {total:,} bytes: {users}."


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
