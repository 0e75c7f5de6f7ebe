"""Cache the scan of image files across jobs, so that a million files are decoded only once.

An entry is valid while the file's (size, mtime_ns, ctime_ns) are unchanged, as in git's index. A cache file that is
damaged, of another version or not writable is ignored.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
from PIL import features

from kdpipe.stages.data.decode import DecodeSpec, PixelCache
from kdpipe.stages.data.image_files import ImageFileList
from kdpipe.stages.data.sources.npz import read_npz
from kdpipe.stages.data.splits import Indices
from kdpipe.stages.errors import DataError
from kdpipe.stages.runtime.cpu import num_cores
from kdpipe.store import make_folders, write_atomically

Stamp = tuple[int, int, int]
"""(size in bytes, mtime_ns, ctime_ns) of a file."""

NO_STAMP: Stamp = (-1, -1, -1)

RACY_NS = 2_000_000_000
"""A file changed less than this before it was read is not cached: it could change again within one tick of the disk's
clock without a new stamp. 2 s is the coarsest tick, FAT's.
"""

VERSION = 1

MAX_THREADS = 16

CHUNK = 256
"""Maximum number of tasks queued in the thread pool: a million of them would take a gigabyte."""

SAVE_EVERY_S = 120.0
"""Seconds between saves: the work that a killed job repeats."""


@dataclass(frozen=True, eq=False)
class ScanCache:
    """Cached scan results, sorted by sample id.

    Attributes:
        ids: Unique sample ids, int64 [N].
        stamps: File stamps, int64 [N, 3].
        checksums: As in ImageFiles, uint32 [N].
        shapes: As in ImageFiles, int32 [N, 2].
    """

    ids: npt.NDArray[np.int64]
    stamps: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint32]
    shapes: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: npt.NDArray[np.int64], stamps: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the row of each sample of `ids` [M] whose file still has its `stamps` [M, 3], else -1: int64 [M]."""
        if not len(self):
            return np.full(len(ids), -1, dtype=np.int64)
        rows = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        valid = (self.ids[rows] == ids) & (self.stamps[rows] == stamps).all(axis=1) & (stamps != NO_STAMP).all(axis=1)
        return np.where(valid, rows, -1)

    def take(self, rows: Indices | npt.NDArray[np.bool_]) -> ScanCache:
        return ScanCache(self.ids[rows], self.stamps[rows], self.checksums[rows], self.shapes[rows])

    def updated(self, newer: ScanCache) -> ScanCache:
        """Return the union of both, preferring entries of `newer`."""
        kept = self.take(~np.isin(self.ids, newer.ids))
        both = ScanCache(
            np.concatenate([kept.ids, newer.ids]),
            np.concatenate([kept.stamps, newer.stamps]),
            np.concatenate([kept.checksums, newer.checksums]),
            np.concatenate([kept.shapes, newer.shapes]),
        )
        return both.take(np.argsort(both.ids))


def empty_cache() -> ScanCache:
    return ScanCache(
        np.empty(0, np.int64), np.empty((0, 3), np.int64), np.empty(0, np.uint32), np.empty((0, 2), np.int32)
    )


def stamp(path: Path) -> Stamp:
    """Return the file's stamp, or NO_STAMP, which is never valid, if it cannot be read."""
    try:
        status = os.stat(path)  # noqa: PTH116 - Path.stat costs twice as much, and there may be a million
    except OSError:
        return NO_STAMP
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_settled(found: Stamp, now_ns: int) -> bool:
    """Return whether the last change is so long before `now_ns` that a later one must alter the stamp."""
    return found != NO_STAMP and max(found[1], found[2]) < now_ns - RACY_NS


def cache_path(folder: Path, spec: DecodeSpec, environ: Mapping[str, str]) -> Path | None:
    """Return the cache file for the images below `folder` decoded to `spec`; None without a home folder."""
    cache = Path(environ.get("XDG_CACHE_HOME") or "")
    if not cache.is_absolute():  # the XDG specification ignores relative paths
        try:
            cache = Path(environ.get("HOME") or Path.home()) / ".cache"
        except RuntimeError:  # a user without a home
            return None
    key = os.fsencode(folder.absolute()) + f"\0{spec.channels}\0{spec.size}\0{spec.crop}".encode()
    return cache / "kdpipe" / "images" / f"{hashlib.sha256(key).hexdigest()}.npz"


def read_cache(path: Path | None) -> ScanCache:
    """Read the cache file at `path`; return an empty cache if it is missing or unusable."""
    if path is None:
        return empty_cache()
    try:
        arrays = read_npz(path, required=("made_by", "ids", "stamps", "checksums", "shapes"))
    except (DataError, OSError):
        return empty_cache()
    cache = ScanCache(arrays["ids"], arrays["stamps"], arrays["checksums"], arrays["shapes"])
    return cache if arrays["made_by"].tolist() == [_made_by()] and _is_valid(cache) else empty_cache()


def write_cache(path: Path | None, cache: ScanCache) -> None:
    """Replace the cache file at `path` atomically; of two concurrent jobs the last one wins."""
    if path is None:
        return
    file = io.BytesIO()
    np.savez(
        file,
        made_by=np.array([_made_by()]),
        ids=cache.ids,
        stamps=cache.stamps,
        checksums=cache.checksums,
        shapes=cache.shapes,
    )
    try:
        make_folders([path.parent])
        write_atomically(path, file.getvalue())
    except OSError:
        return  # a full or read-only disk must not fail this job


def _made_by() -> str:
    """Return the versions of the decoders, which determine the pixels."""
    codecs = ", ".join(f"{codec} {features.version(codec)}" for codec in ("jpg", "webp", "libtiff"))
    return f"kdpipe image index {VERSION}, Pillow {PIL.__version__}, {codecs}"


def _is_valid(cache: ScanCache) -> bool:
    empty = empty_cache()
    for name in ("ids", "stamps", "checksums", "shapes"):
        found, model = getattr(cache, name), getattr(empty, name)
        if found.dtype != model.dtype or found.ndim != model.ndim or found.shape != (len(cache), *model.shape[1:]):
            return False
    return bool((cache.ids[1:] > cache.ids[:-1]).all() and (cache.shapes > 0).all())


class ScanState:
    """Scan results so far of the images `chosen` [N] of a folder: from an earlier job's cache, and from decoding.

    Attributes:
        seen: Whether the image is known and readable, bool [N].
        checksums: As in ImageFiles, uint32 [N].
        shapes: As in ImageFiles, int32 [N, 2].
    """

    def __init__(self, files: ImageFileList, chosen: ImageFileList, pixel_cache: PixelCache) -> None:
        self._all_ids, self._ids = files.sample_ids, chosen.sample_ids
        self._path = cache_path(files.folder, files.spec, os.environ)
        self._unsaved, self._saved_at = False, time.monotonic()
        self.image_batch = np.zeros(len(chosen), dtype=np.bool_)
        self.checksums = np.zeros(len(chosen), dtype=np.uint32)
        self.shapes = np.zeros((len(chosen), 2), dtype=np.int32)
        self._stamps = np.full((len(chosen), 3), NO_STAMP, dtype=np.int64)
        spec = files.spec
        must_decode = spec.size is not None and pixel_cache.fits((spec.channels, spec.size, spec.size))
        cache = empty_cache() if must_decode else read_cache(self._path)
        if len(cache):
            self._restore(cache, chosen, pixel_cache)

    def _restore(self, cache: ScanCache, chosen: ImageFileList, pixel_cache: PixelCache) -> None:
        """Take the valid entries of the cache; deactivate `pixel_cache` if their sizes do not allow it."""
        found = cache.find(self._ids, _stamps(chosen))
        self.image_batch = found >= 0
        entries = cache.take(found[self.image_batch])
        self.checksums[self.image_batch], self.shapes[self.image_batch] = entries.checksums, entries.shapes
        self._stamps[self.image_batch] = entries.stamps
        shapes = np.unique(entries.shapes, axis=0).tolist()
        if len(shapes) > 1 or (shapes and not pixel_cache.fits((chosen.spec.channels, *shapes[0]))):
            pixel_cache.deactivate()

    def add(self, index: int, found: Stamp, checksum: int, shape: tuple[int, int]) -> None:
        """Record a decoded image; with NO_STAMP it is not cached beyond this job."""
        self.image_batch[index], self._stamps[index] = True, found
        self.checksums[index], self.shapes[index] = checksum, shape
        self._unsaved = True

    def discard(self, index: int) -> None:
        """Mark the image as unreadable."""
        self.image_batch[index] = False

    def save_periodically(self) -> None:
        """Save if SAVE_EVERY_S have passed since the last save."""
        if time.monotonic() - self._saved_at >= SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Merge the new results into the cache file, dropping entries of files that are no longer listed."""
        if not self._unsaved:
            return
        valid = self.image_batch & (self._stamps != NO_STAMP).all(axis=1)
        found = ScanCache(self._ids[valid], self._stamps[valid], self.checksums[valid], self.shapes[valid])
        if len(found):
            known = read_cache(self._path)
            write_cache(self._path, known.take(np.isin(known.ids, self._all_ids)).updated(found))
        self._unsaved, self._saved_at = False, time.monotonic()


@contextmanager
def scan_threads() -> Iterator[ThreadPoolExecutor]:
    """Open a pool of one thread per core: decoders and disks run outside the GIL. An error cancels queued tasks."""
    pool = ThreadPoolExecutor(min(num_cores(), MAX_THREADS))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _stamps(chosen: ImageFileList) -> npt.NDArray[np.int64]:
    """Read the stamp of each file in threads, int64 [N, 3]: network disks answer slowly, but many at once."""

    def of_chunk(start: int) -> list[Stamp]:
        return [stamp(chosen.paths[index]) for index in range(start, min(start + CHUNK, len(chosen)))]

    with scan_threads() as pool:
        chunks = pool.map(of_chunk, range(0, len(chosen), CHUNK))
        return np.array([found for chunk in chunks for found in chunk], dtype=np.int64)
