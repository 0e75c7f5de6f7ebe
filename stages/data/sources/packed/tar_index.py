"""The index of a tar file: where its images lie and what their labels are, cached while the file is unchanged.

The library `webdataset` reads tar files from start to end; views and students need any sample at any time.
"""

from __future__ import annotations

import os
import tarfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from kdpipe.stages.data.image_source import Names, pack_names
from kdpipe.stages.data.scan_cache import cached_arrays
from kdpipe.stages.data.sources.packed.samples import Grouping
from kdpipe.stages.errors import DataError, cause

VERSION = "kdpipe tar index 1"


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The N samples of a tar file: offset and size of each image in bytes, int64 [N], its name, and its label."""

    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    names: Names
    labels: Names


def index_tar(path: Path) -> TarIndex:
    """Return the index of a tar file, from the cache if the file is unchanged.

    Raises:
        DataError: The file is missing, damaged, cut off or compressed, or a sample has not one image.
    """
    return TarIndex(**cached_arrays("shards", path, VERSION, lambda: vars(_index(path))))


def _index(path: Path) -> TarIndex:
    grouping = Grouping(str(path))
    places: list[tuple[int, int]] = []
    last = "its start"
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined] # millions of them would take gigabytes
                last = member.name
                if member.isreg() and member.sparse is None:
                    grouping.add(_normal(last), len(places), member.size, lambda: _content(file, member))
                    places.append((member.offset_data, member.size))
                elif not member.isdir():
                    raise DataError(f"{path}: {last} is a link or no plain file: write the files themselves.")
            _require_end(path, file, tar.offset, last)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read as a tar file after {last} ({cause(error)}): copy or make it again; "
            "it must not be compressed."
        ) from error
    names, numbers, labels = grouping.finish()
    offsets, sizes = np.array([places[number] for number in numbers], dtype=np.int64).reshape(-1, 2).T
    return TarIndex(offsets, sizes, pack_names(names), pack_names(labels))


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", os.path.normpath(name).replace(os.sep, "/"))


def _content(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)  # tarfile seeks before it reads
    content = file.read(member.size)
    if len(content) != member.size:
        raise EOFError("unexpected end of data")
    return content


def _require_end(path: Path, file: IO[bytes], offset: int, last: str) -> None:
    """Raise DataError unless a tar file ends at `offset`, where tarfile also stops at what it cannot read."""
    file.seek(offset)
    if not file.read(1):
        raise DataError(f"{path} is cut off after {last}: it has no end mark. Copy or make it again.")
    file.seek(offset)
    while rest := file.read(2**20):
        if rest.strip(b"\0"):
            raise DataError(
                f"{path} is damaged after {last}, or holds several tar files one after the other: copy or make it "
                "again."
            )
