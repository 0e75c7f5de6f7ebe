"""The folder in which this machine's jobs share staged stores: what is in use stays, what was used longest ago goes.

An entry is a folder `{fingerprint}-{digest}` with the copy, `targets.zarr`, and its lock files. Whoever reads the copy
holds a shared lock on the entry's `in-use`, which the kernel drops with the process; who evicts holds it exclusive_store.
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

import numpy as np

from store.fs.atomic_write import PARTIAL_SUFFIX, fsync_path
from store.errors import StoreError
from store.fs.lock import Holder, exclusive, is_file_at, release, acquire
from store.format.manifest import Manifest
from store.format.markers import MARKER_BYTES
from store.format.samples import CHUNK_ROWS, COLUMNS
from store.write.writer import store_bytes
from store.format.zarr_metadata import read_store_manifest

DEFAULT_MAX_BYTES = 200 * 2**30

COPY = "targets.zarr"
IN_USE = "in-use"
STAGING = "staging.lock"

ENTRY = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")
LEFTOVER = re.compile(rf"\.{ENTRY.pattern}\.[0-9a-f]{{8}}{re.escape(PARTIAL_SUFFIX)}")
"""Only folders of these names are ever removed: somebody may name a folder that has other things in it."""


@dataclass(frozen=True)
class StagingCache:
    """Where stores are staged, and how many bytes they may take there together."""

    folder: Path
    max_bytes: int


def default_staging_cache(environ: Mapping[str, str]) -> StagingCache:
    """The area at KDPIPE_CACHE, or at `kdpipe/stores` in the user's cache folder; of KDPIPE_CACHE_BYTES, or 200 GiB.

    Raises StoreError where KDPIPE_CACHE_BYTES is no number of bytes.
    """
    text = environ.get("KDPIPE_CACHE_BYTES") or str(DEFAULT_MAX_BYTES)
    if not re.fullmatch("[0-9]{1,18}", text):
        raise StoreError(
            f"KDPIPE_CACHE_BYTES is {text[:40]!r}: give the bytes that staged stores may take as a whole number, such "
            f"as {DEFAULT_MAX_BYTES} for 200 GiB."
        )
    if named := environ.get("KDPIPE_CACHE"):
        return StagingCache(Path(named).expanduser().absolute(), int(text))
    cache = Path(environ.get("XDG_CACHE_HOME") or "")
    if not cache.is_absolute():  # the XDG specification has relative ones ignored
        cache = Path(environ.get("HOME") or Path.home()) / ".cache"
    return StagingCache(cache / "kdpipe" / "stores", int(text))


def exclusive_cache(area: StagingCache) -> AbstractContextManager[None]:
    """Hold the lock under which room is made and given away; waits for it, as it is held briefly."""
    return exclusive(area.folder, area.folder / ".area.lock", wait=True)


@contextmanager
def using(entry: Path) -> Iterator[None]:
    """Keep `entry` from being evicted while the block runs, and count it as used now. Waits for an eviction to end."""
    descriptor = _share(entry)
    try:
        os.utime(descriptor)
        yield
    finally:
        release(descriptor)


_kept: dict[Path, int] = {}
_keeping = threading.Lock()


def keep(entry: Path) -> None:
    """Keep `entry` from being evicted for as long as this process lives."""
    with _keeping:
        before = _kept.get(entry)
        if before is not None and is_file_at(entry / IN_USE, before):
            return
        _kept[entry] = _share(entry)
        if before is not None:  # somebody removed the folder by hand
            release(before)


def copy_bytes(manifest: Manifest) -> int:
    """What a zero-copy store takes on disk, but for some kilobytes of metadata."""
    units, num_chunks = manifest.layout.units(), -(-manifest.layout.num_rows // CHUNK_ROWS)
    sample_bytes = num_chunks * CHUNK_ROWS * sum(np.dtype(dtype).itemsize for dtype, _ in COLUMNS.values())
    return store_bytes(manifest, units) + len(units) * MARKER_BYTES + sample_bytes


def make_room(area: StagingCache, entry: Path, planned_bytes: int) -> None:
    """Evict entries, the one used longest ago first, until `entry` may grow to `planned_bytes`.

    The caller is `alone_in` the area and uses `entry`. Raises StoreError, and evicts nothing, where it cannot fit: not
    within the area's limit, or not on its disk.
    """
    _sweep(area)
    others = [_Other.at(folder) for folder in _folders(area) if folder != entry]
    new_bytes = planned_bytes - _folder_bytes(entry)
    evicted: list[_Other] = []
    in_use: dict[_Other, Holder] = {}
    with ExitStack() as locks:
        for other in sorted(others, key=lambda other: other.last_used):
            if not _shortage(area, planned_bytes, new_bytes, others, evicted):
                break
            taken = acquire(other.folder / IN_USE, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if isinstance(taken, Holder):
                in_use[other] = taken
            else:
                locks.callback(release, taken)
                evicted.append(other)
        if shortage := _shortage(area, planned_bytes, new_bytes, others, evicted):
            raise StoreError(shortage + _in_use(in_use))
        aside = [_set_aside(other.folder) for other in evicted]
    for folder in aside:
        shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed now is swept another time


@dataclass(frozen=True)
class _Other:
    """An entry that is in the way: what it may still grow to, what it takes, and when it was last used (ns)."""

    folder: Path
    reserved_bytes: int
    disk_bytes: int
    last_used: int

    @staticmethod
    def at(folder: Path) -> _Other:
        disk_bytes, in_use = _folder_bytes(folder), folder / IN_USE
        try:
            reserved = copy_bytes(read_store_manifest(folder / COPY))
        except StoreError:
            reserved = disk_bytes
        return _Other(folder, reserved, disk_bytes, in_use.stat().st_mtime_ns if in_use.exists() else 0)


def _shortage(
    area: StagingCache, planned_bytes: int, new_bytes: int, others: Sequence[_Other], evicted: Sequence[_Other]
) -> str | None:
    """Why an entry would not fit even if the `doomed` were gone; None where it would."""
    reserved = sum(other.reserved_bytes for other in others if other not in evicted)
    free = shutil.disk_usage(area.folder).free + sum(other.disk_bytes for other in evicted)
    if planned_bytes + reserved > area.max_bytes:
        return (
            f"the store needs {planned_bytes:,} bytes in {area.folder}, where staged stores may take "
            f"{area.max_bytes:,} together: set KDPIPE_CACHE_BYTES higher, or KDPIPE_CACHE to a folder on another disk."
        )
    if new_bytes > free:
        return (
            f"the store needs {new_bytes:,} bytes more in {area.folder}, whose disk has {free:,} free: make room, or "
            "set KDPIPE_CACHE to a folder on another disk."
        )
    return None


def _in_use(in_use: Mapping[_Other, Holder]) -> str:
    if not in_use:
        return ""
    users = ", ".join(f"{other.folder.name} ({who})" for other, who in in_use.items())
    total = sum(other.reserved_bytes for other in in_use)
    return f" In use, and not to be evicted, are {total:,} bytes: {users}."


def _share(entry: Path) -> int:
    taken = acquire(entry / IN_USE, fcntl.LOCK_SH)
    assert isinstance(taken, int), "a lock that is waited for is never refused"
    return taken


def _set_aside(folder: Path) -> Path:
    """Take an entry out of the area in one step: a crash while it is removed leaves no half of it to be used."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")
    folder.rename(aside)
    fsync_path(folder.parent)
    return aside


def _sweep(area: StagingCache) -> None:
    """Remove what evictions that were killed had set aside."""
    for path in area.folder.iterdir():
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _folders(area: StagingCache) -> list[Path]:
    return [path for path in area.folder.iterdir() if ENTRY.fullmatch(path.name) and not path.is_symlink()]


def _folder_bytes(folder: Path) -> int:
    total = 0
    for inside, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # another job fills this entry, and renames what it has written
                total += os.lstat(Path(inside, name)).st_size
    return total
