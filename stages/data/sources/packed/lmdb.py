"""`lmdb:PATH`: LMDB databases of encoded images with the keys of WebDataset's members: NAME.jpg, NAME.cls.

The layouts in use differ from code to code, and most hold pickles, which are never loaded.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kdpipe.stages.data.decode import DecodeSpec
from kdpipe.stages.data.image_source import EncodedImages, Names, Stamp, name_at, pack_names, stamp
from kdpipe.stages.data.scan_cache import cached_arrays
from kdpipe.stages.data.sources.listing import Listing
from kdpipe.stages.data.sources.packed.samples import Grouping, PackedSamples, list_packed
from kdpipe.stages.data.sources.split_folders import Role, role_of
from kdpipe.stages.data.splits import Indices, Split
from kdpipe.stages.errors import DataError, cause, first_few

VERSION = "kdpipe LMDB index 1"

_ENVIRONMENTS: dict[str, Any] = {}
"""The databases that this process has opened: LMDB opens each once. Forked workers may read through them."""

_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class LmdbValues(EncodedImages):
    """N images in an LMDB database: its path, and their keys."""

    path: Path
    keys: Names

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, indices: Indices) -> Self:
        return type(self)(self.path, self.keys[indices])

    def where(self, index: int) -> str:
        return f"{self.path}: {name_at(self.keys, index)}"

    def stamp(self, index: int) -> Stamp:
        return stamp(_file(self.path))

    def read(self, index: int) -> bytes:
        with _opened(self.path).begin() as transaction:
            value: bytes | None = transaction.get(bytes(self.keys[index]))
        if value is None:
            raise FileNotFoundError(errno.ENOENT, "the key is gone")
        return value


def list_lmdb(path: Path, split: Split, spec: DecodeSpec) -> Listing:
    """List the samples of one split, sorted by key, to be decoded to `spec`; ids are hashes of the images' keys.

    PATH is one database, or a folder with one for each split, such as train.lmdb and val.lmdb.

    Raises:
        DataError: A database is missing or damaged, or a sample has not one image.
    """
    title = f"lmdb:{path.name}"
    databases: dict[Role | None, Path] = {None: path} if _file(path).is_file() else _split_databases(path)
    unsplit = None in databases
    train = _samples(databases[None] if unsplit else databases["train"])
    test: Role = "test" if "test" in databases else "val"
    chosen = train if unsplit or split == "train" else _samples(databases[test])
    listing = list_packed(title, path if unsplit else path / split, chosen, train, spec)
    return Listing(**{**vars(listing), "unsplit": unsplit})


def _split_databases(path: Path) -> dict[Role | None, Path]:
    found: dict[Role | None, Path] = {}
    for each in sorted(path.iterdir()) if path.is_dir() else []:
        is_database = _file(each).is_file() and (each.is_dir() or each.suffix in (".lmdb", ".mdb"))
        role = role_of(each.stem) if is_database else None
        if role and role in found:
            raise DataError(f"{found[role]} and {each} are both the {role} split: remove or rename one.")
        if role:
            found[role] = each
    if "train" not in found or not {"test", "val"} & set(found):
        names = first_few([each.name for each in found.values()]) or "none"
        raise DataError(
            f"no LMDB database {path.absolute()}: lmdb:PATH is relative to data.root unless absolute, and is a "
            f"database, or a folder with train.lmdb and test.lmdb; found of these: {names}."
        )
    return found


def _samples(path: Path) -> PackedSamples:
    index = cached_arrays("lmdb", path, VERSION, lambda: _index(path), file=_file(path))
    return PackedSamples(LmdbValues(path, index["keys"]), **index)


def _index(path: Path) -> dict[str, Names]:
    """Return the keys of the images in a database, and their labels."""
    grouping = Grouping(str(path))
    first, number = b"", 0
    for number, (key, size, read) in enumerate(_entries(path), 1):
        first = first or key
        with suppress(UnicodeDecodeError):  # of another layout
            grouping.add(key.decode(), number, size, read)
    keys, _, labels = grouping.finish()
    if not keys:
        raise DataError(
            f"{path} holds no images in keys such as NAME.jpg beside labels in NAME.cls; found {number} keys, such "
            f"as {first.decode(errors='replace')!r:.40}: pickled entries of other layouts are never loaded."
        )
    return {"keys": pack_names(keys), "labels": pack_names(labels)}


def _entries(path: Path) -> Iterator[tuple[bytes, int, Callable[[], bytes]]]:
    try:
        with _opened(path).begin(buffers=True) as transaction, transaction.cursor() as cursor:
            for key, value in cursor:
                yield bytes(key), len(value), value.tobytes
    except DataError:
        raise
    except Exception as error:  # of a damaged database anything
        raise DataError(f"{path} cannot be read as an LMDB database ({cause(error)}).") from error


def _opened(path: Path) -> Any:
    """Return the opened database, for reading only and without locks: no job may write to it meanwhile."""
    try:
        import lmdb
    except ImportError as error:
        raise DataError("lmdb:PATH needs the library lmdb: pip install 'kdpipe[lmdb]'.") from error
    with _LOCK:
        if str(path) not in _ENVIRONMENTS:
            _ENVIRONMENTS[str(path)] = lmdb.open(
                str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False
            )
        return _ENVIRONMENTS[str(path)]


def _file(path: Path) -> Path:
    return path / "data.mdb" if path.is_dir() else path
