"""Cache the scan of image files across jobs, so that a million files are decoded only once.

An entry is valid while the file's (size, mtime_ns, ctime_ns) are unchanged, as in git's index. A cache file that is
damaged, of another version or not writable is ignored.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL
from PIL import features

from kdpipe.stages.data.decode import DecodeSpec
from kdpipe.stages.data.image_files import ImageFileList
from kdpipe.stages.data.image_source import NO_STAMP, Stamp, stamp
from kdpipe.stages.runtime.cpu import num_cores
from kdpipe.store import make_folders, write_atomically

ENTRY = np.dtype([("id", "<i8"), ("stamp", "<i8", 3), ("checksum", "<u4"), ("shape", "<i4", 2)])
"""A scanned image: sample id, its file's stamp, crc32c of the decoded [C, H, W] bytes, and (H, W)."""

Entries: TypeAlias = npt.NDArray[np.void]
"""Array [N] of ENTRY; in a cache file sorted by id."""

RACY_NS = 2_000_000_000
"""A file changed less than this before it was read is not cached: it could change again within one tick of the disk's
clock without a new stamp. 2 s is the coarsest tick, FAT's.
"""

VERSION = 2

CODECS = ("jpg", "webp", "libtiff", "jpg_2000", "avif")
"""Pillow's names of the libraries that decode."""

MAX_THREADS = 16

CHUNK = 256
"""Maximum number of tasks queued in the thread pool: a million of them would take a gigabyte."""

SAVE_EVERY_S = 120.0
"""Seconds between saves: the work that a killed job repeats."""


def is_settled(found: Stamp, now_ns: int) -> bool:
    """Return whether the last change is so long before `now_ns` that a later one must alter the stamp."""
    return found != NO_STAMP and max(found[1], found[2]) < now_ns - RACY_NS


def cache_path(folder: Path, spec: DecodeSpec, environ: Mapping[str, str]) -> Path | None:
    """Return the cache file for the images below `folder` decoded to `spec`; None without a home folder."""
    key = os.fsencode(folder.absolute()) + f"\0{spec.channels}\0{spec.size}\0{spec.crop}".encode()
    return cache_file("images", key, environ)


def cache_file(kind: str, key: bytes, environ: Mapping[str, str]) -> Path | None:
    """Return the cache file for `key` among those of a kind; None without a home folder."""
    cache = Path(environ.get("XDG_CACHE_HOME") or "")
    if not cache.is_absolute():  # the XDG specification ignores relative paths
        try:
            cache = Path(environ.get("HOME") or Path.home()) / ".cache"
        except RuntimeError:  # a user without a home
            return None
    return cache / "kdpipe" / kind / f"{hashlib.sha256(key).hexdigest()}.npz"


def read_cache(path: Path | None) -> Entries:
    """Read the cache file at `path`; return no entries if it is missing or unusable."""
    try:
        if path is not None:
            with np.load(path, allow_pickle=False) as arrays:
                made_by, entries = arrays["made_by"], arrays["entries"]
            if made_by.tolist() == [_made_by()] and entries.dtype == ENTRY and (np.diff(entries["id"]) > 0).all():
                return entries  # type: ignore[no-any-return]
    except Exception:
        pass
    return np.empty(0, ENTRY)


def write_cache(path: Path | None, entries: Entries) -> None:
    """Replace the cache file at `path` atomically; of two concurrent jobs the last one wins."""
    write_arrays(path, {"made_by": np.array([_made_by()]), "entries": entries})


def cached_arrays(
    kind: str, path: Path, version: str, make: Callable[[], Mapping[str, npt.NDArray[Any]]], *, file: Path | None = None
) -> Mapping[str, npt.NDArray[Any]]:
    """Return the arrays that `make` reads from a file, from the cache if the file is unchanged.

    Args:
        kind: The folder in the cache.
        path: What the arrays are of: the file, or what its errors call it.
        version: What made them: others are not taken.
        make: Reads them.
        file: The file, if that is not `path`.
    """
    now_ns, found = time.time_ns(), stamp(file or path)
    cached = cache_file(kind, os.fsencode(path.absolute()), os.environ)
    made_by = [version, *map(str, found)]
    if not is_settled(found, now_ns):
        return make()
    try:
        with np.load(cached, allow_pickle=False) as arrays:  # type: ignore[arg-type]
            if arrays["made_by"].tolist() == made_by:
                return {key: arrays[key] for key in arrays.files if key != "made_by"}
    except Exception:  # missing or damaged: they are made again
        pass
    made = make()
    write_arrays(cached, {"made_by": np.array(made_by), **made})
    return made


def write_arrays(path: Path | None, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write a cache file atomically, if it can be written."""
    if path is None:
        return
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    try:
        make_folders([path.parent])
        write_atomically(path, file.getvalue())
    except OSError:
        return  # a full or read-only disk must not fail this job


def find_valid(cache: Entries, ids: npt.NDArray[np.int64], stamps: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the row of each sample of `ids` [M] whose file still has its `stamps` [M, 3], else -1: int64 [M]."""
    if not len(cache):
        return np.full(len(ids), -1, dtype=np.int64)
    rows = np.minimum(np.searchsorted(cache["id"], ids), len(cache) - 1)
    valid = (cache["id"][rows] == ids) & (cache["stamp"][rows] == stamps).all(axis=1) & has_stamp(stamps)
    return np.where(valid, rows, -1)


def has_stamp(stamps: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return whether each of `stamps`, int64 [N, 3], is not NO_STAMP."""
    return (stamps != NO_STAMP).all(axis=1)  # type: ignore[no-any-return]


def merge(older: Entries, newer: Entries) -> Entries:
    """Return the union of both, sorted by id, preferring entries of `newer`."""
    both = np.concatenate([older[~np.isin(older["id"], newer["id"])], newer])
    return both[np.argsort(both["id"])]


def _made_by() -> str:
    """Return the versions of the decoders, which determine the pixels."""
    codecs = ", ".join(f"{codec} {features.version(codec)}" for codec in CODECS)
    return f"kdpipe image index {VERSION}, Pillow {PIL.__version__}, {codecs}"


class ScanState:
    """Scan results so far of the images `chosen` [N] of a folder: from an earlier job's cache, and from decoding.

    Attributes:
        entries: One for each image, whose stamp is NO_STAMP if it must not be cached beyond this job.
        readable: Whether the image is known and readable, bool [N].
    """

    def __init__(self, files: ImageFileList, chosen: ImageFileList) -> None:
        self._all_ids = files.sample_ids
        self._path = cache_path(files.folder, files.spec, os.environ)
        self._unsaved, self._saved_at = False, time.monotonic()
        self.readable = np.zeros(len(chosen), dtype=np.bool_)
        self.entries = np.zeros(len(chosen), dtype=ENTRY)
        self.entries["id"], self.entries["stamp"] = chosen.sample_ids, NO_STAMP

    def restore(self, chosen: ImageFileList) -> list[list[int]]:
        """Take the valid entries of the cache; return the different shapes of their images."""
        cache = read_cache(self._path)
        if len(cache):
            rows = find_valid(cache, chosen.sample_ids, _read_stamps(chosen))
            self.readable = rows >= 0
            self.entries[self.readable] = cache[rows[self.readable]]
        shapes: list[list[int]] = np.unique(self.entries["shape"][self.readable], axis=0).tolist()
        return shapes

    def add(self, index: int, found: Stamp, checksum: int, shape: tuple[int, int]) -> None:
        """Record a decoded image."""
        self.entries[index] = (self.entries["id"][index], found, checksum, shape)
        self.readable[index] = self._unsaved = True

    def save_periodically(self) -> None:
        """Save if SAVE_EVERY_S have passed since the last save."""
        if time.monotonic() - self._saved_at >= SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Merge the new results into the cache file, dropping entries of files that are no longer listed."""
        found = self.entries[self.readable & has_stamp(self.entries["stamp"])]
        if self._unsaved and len(found):
            known = read_cache(self._path)
            write_cache(self._path, merge(known[np.isin(known["id"], self._all_ids)], found))
        self._unsaved, self._saved_at = False, time.monotonic()


@contextmanager
def scan_threads() -> Iterator[Callable[..., Iterator[Any]]]:
    """Open a pool of one thread per core and yield its `map`: decoders and disks run outside the GIL.

    An error cancels queued tasks.
    """
    pool = ThreadPoolExecutor(min(num_cores(), MAX_THREADS))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _read_stamps(chosen: ImageFileList) -> npt.NDArray[np.int64]:
    """Read the stamp of each file in threads, int64 [N, 3]: network disks answer slowly, but many at once."""

    def of_chunk(start: int) -> list[Stamp]:
        return [chosen.source.stamp(index) for index in range(start, min(start + CHUNK, len(chosen)))]

    with scan_threads() as map_threads:
        chunks = map_threads(of_chunk, range(0, len(chosen), CHUNK))
        return np.array([found for chunk in chunks for found in chunk], dtype=np.int64)
