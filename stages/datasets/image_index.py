"""What an image decoded to, remembered from job to job, so that a million of them are surveyed once.

An entry holds for as long as the file's (size, mtime_ns, ctime_ns) stay as they were, as in git's index. It is a
cache: one that is damaged, of another version or cannot be written is done without.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
from PIL import features

from stages.datasets.npz import read_npz
from stages.datasets.pixels import Form
from stages.errors import DataError
from store import make_folders, write_atomically

Stamp = tuple[int, int, int]
"""(size in bytes, mtime_ns, ctime_ns) of a file."""

NO_STAMP: Stamp = (-1, -1, -1)

RACY_NS = 2_000_000_000
"""A file changed less than this before it was read may change again within one tick of its disk's clock, unseen: it
is not remembered. 2 s is the coarsest tick, FAT's.
"""

VERSION = 1


@dataclass(frozen=True, eq=False)
class ImageIndex:
    """Entries in the order of their sample ids: `ids` int64 [N], each once; `stamps` int64 [N, 3]; `checksums` uint32
    [N] and `shapes` int32 [N, 2], as ImageFiles has them.
    """

    ids: npt.NDArray[np.int64]
    stamps: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint32]
    shapes: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: npt.NDArray[np.int64], stamps: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the samples `ids` [M] stand whose files still have the `stamps` [M, 3]; else -1: int64 [M]."""
        if not len(self):
            return np.full(len(ids), -1, dtype=np.int64)
        at = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        holds = (self.ids[at] == ids) & (self.stamps[at] == stamps).all(axis=1) & (stamps != NO_STAMP).all(axis=1)
        return np.where(holds, at, -1)

    def take(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> ImageIndex:
        return ImageIndex(self.ids[rows], self.stamps[rows], self.checksums[rows], self.shapes[rows])

    def updated(self, newer: ImageIndex) -> ImageIndex:
        """Both together; of two entries of one sample the `newer`."""
        kept = self.take(~np.isin(self.ids, newer.ids))
        both = ImageIndex(
            np.concatenate([kept.ids, newer.ids]),
            np.concatenate([kept.stamps, newer.stamps]),
            np.concatenate([kept.checksums, newer.checksums]),
            np.concatenate([kept.shapes, newer.shapes]),
        )
        return both.take(np.argsort(both.ids))


def empty_index() -> ImageIndex:
    return ImageIndex(
        np.empty(0, np.int64), np.empty((0, 3), np.int64), np.empty(0, np.uint32), np.empty((0, 2), np.int32)
    )


def stamp(path: Path) -> Stamp:
    """The file's stamp; NO_STAMP, which never holds, if it has none."""
    try:
        status = os.stat(path)  # noqa: PTH116 - Path.stat costs twice as much, and there may be a million
    except OSError:
        return NO_STAMP
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_settled(one: Stamp, now_ns: int) -> bool:
    """Whether the file was last changed so long before `now_ns` that a later change must show in its stamp."""
    return one != NO_STAMP and max(one[1], one[2]) < now_ns - RACY_NS


def index_path(folder: Path, form: Form, environ: Mapping[str, str]) -> Path | None:
    """The index file of the images below `folder`, decoded to `form`; None where there is no cache folder."""
    cache = Path(environ.get("XDG_CACHE_HOME") or "")
    if not cache.is_absolute():  # the XDG specification has relative ones ignored
        try:
            cache = Path(environ.get("HOME") or Path.home()) / ".cache"
        except RuntimeError:  # a user without a home
            return None
    key = os.fsencode(folder.absolute()) + f"\0{form.channels}\0{form.size}\0{form.crop}".encode()
    return cache / "kdpipe" / "images" / f"{hashlib.sha256(key).hexdigest()}.npz"


def read_index(path: Path | None) -> ImageIndex:
    """The index at `path`; an empty one if there is none, or none that this program can use."""
    if path is None:
        return empty_index()
    try:
        arrays = read_npz(path, wanted=("made_by", "ids", "stamps", "checksums", "shapes"))
    except (DataError, OSError):
        return empty_index()
    index = ImageIndex(arrays["ids"], arrays["stamps"], arrays["checksums"], arrays["shapes"])
    return index if arrays["made_by"].tolist() == [_made_by()] and _is_sound(index) else empty_index()


def write_index(path: Path | None, index: ImageIndex) -> None:
    """Put the index in the place of the one at `path`, whole; of two jobs that do so at once the last one wins."""
    if path is None:
        return
    file = io.BytesIO()
    np.savez(
        file,
        made_by=np.array([_made_by()]),
        ids=index.ids,
        stamps=index.stamps,
        checksums=index.checksums,
        shapes=index.shapes,
    )
    try:
        make_folders([path.parent])
        write_atomically(path, file.getvalue())
    except OSError:
        return  # a full or read-only disk costs the next job time, not this one its result


def _made_by() -> str:
    """What decided the pixels: another decoder may give other ones."""
    codecs = ", ".join(f"{codec} {features.version(codec)}" for codec in ("jpg", "webp", "libtiff"))
    return f"kdpipe image index {VERSION}, Pillow {PIL.__version__}, {codecs}"


def _is_sound(index: ImageIndex) -> bool:
    empty = empty_index()
    for name in ("ids", "stamps", "checksums", "shapes"):
        found, model = getattr(index, name), getattr(empty, name)
        if found.dtype != model.dtype or found.ndim != model.ndim or found.shape != (len(index), *model.shape[1:]):
            return False
    return bool((index.ids[1:] > index.ids[:-1]).all() and (index.shapes > 0).all())
