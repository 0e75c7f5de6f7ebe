"""Where the images of a data set lie until they are decoded: in files, in parts of files, or behind a library."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from kdpipe.stages.data.decode import DecodeSpec, Pixels, decode_image
from kdpipe.stages.data.splits import Indices

Names = npt.NDArray[np.bytes_]
"""N names in one array, which forked workers share: a million str or Path would be copied as their counts change."""

Stamp = tuple[int, int, int]
"""(size in bytes, mtime_ns, ctime_ns) of a file."""

NO_STAMP: Stamp = (-1, -1, -1)


def stamp(path: str | Path) -> Stamp:
    """Return the file's stamp, or NO_STAMP, which is never valid, if it cannot be read."""
    try:
        status = os.stat(path)  # noqa: PTH116 - Path.stat costs twice as much, and there may be a million
    except OSError:
        return NO_STAMP
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def pack_names(names: Iterable[str | Path]) -> Names:
    """Pack names or paths into an array."""
    return np.array([os.fsencode(name) for name in names], dtype=np.bytes_)


def name_at(names: Names, index: int) -> str:
    """Return one of the packed names."""
    return os.fsdecode(bytes(names[index]))


class ImageSource(ABC):
    """N images, each read by its index, in threads and in worker processes, forked or not.

    Anything that neither may share, such as an open file, is opened for each image, or kept by process.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, indices: Indices) -> Self:
        """Return the images at `indices`, int64 [M], in that order."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Return where an image lies, for messages: its path, or its file and its name in there."""

    @abstractmethod
    def stamp(self, index: int) -> Stamp:
        """Return the stamp of the file that an image is in, NO_STAMP if it has none: its scan is not cached then."""

    @abstractmethod
    def decode(self, index: int, spec: DecodeSpec) -> Pixels:
        """Decode an image to a new uint8 array [C, H, W].

        Raises:
            UnreadableImage: It is damaged, missing or no image.
        """


@dataclass(frozen=True, eq=False)
class FilePaths(ImageSource):
    """Image files, of which `paths` [N] are the packed paths."""

    paths: Names

    @classmethod
    def pack(cls, paths: Iterable[str | Path]) -> Self:
        """Pack paths into an array."""
        return cls(pack_names(paths))

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Indices) -> Self:
        return type(self)(self.paths[indices])

    def where(self, index: int) -> str:
        return name_at(self.paths, index)

    def stamp(self, index: int) -> Stamp:
        return stamp(self.where(index))

    def decode(self, index: int, spec: DecodeSpec) -> Pixels:
        return decode_image(self.where(index), spec)


class EncodedImages(ImageSource):
    """Encoded images that are no files of their own."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the bytes of an image. Raises OSError if they cannot be read."""

    def decode(self, index: int, spec: DecodeSpec) -> Pixels:
        return decode_image(self.where(index), spec, lambda: BytesIO(self.read(index)))
