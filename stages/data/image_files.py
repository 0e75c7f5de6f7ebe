"""Images that stay on disk and are decoded on access: more than memory holds, or of unequal sizes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt
from torch import Tensor

from kdpipe.stages.data.decode import DecodeSpec, Pixels, UnreadableImage, decode_image, quiet_pillow
from kdpipe.stages.data.splits import Indices

Paths = npt.NDArray[np.bytes_]
"""N paths in one array, which forked workers share: a million Path objects would be copied as their counts change."""


def pack_paths(paths: Iterable[str | Path]) -> Paths:
    """Pack paths into an array."""
    return np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)


def path_at(paths: Paths, index: int) -> Path:
    """Return one of the packed paths."""
    return Path(os.fsdecode(bytes(paths[index])))


@dataclass(frozen=True, eq=False)
class ImageFileList:
    """N image files of the data set `name` below `folder`, not decoded yet; `sample_ids` int64 [N]."""

    name: str
    folder: Path
    paths: Paths
    sample_ids: Indices
    spec: DecodeSpec

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Indices) -> ImageFileList:
        """Return the files at `indices`, int64 [M], in that order."""
        return dataclasses.replace(self, paths=self.paths[indices], sample_ids=self.sample_ids[indices])


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """N scanned image files. All data is in arrays, which forked workers share.

    Attributes:
        checksums: crc32c of each decoded image's [C, H, W] bytes when the data set was scanned: uint32 [N].
        shapes: (H, W) of each decoded image: int32 [N, 2].
        levels: How often each gray level occurs in each channel, int64 [C, 256], where a run would keep the images in
            memory; None for those that stay files.
    """

    paths: Paths
    spec: DecodeSpec
    checksums: npt.NDArray[np.uint32]
    shapes: npt.NDArray[np.int32]
    levels: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def common_shape(self) -> tuple[int, int] | None:
        """(H, W) of all images; None if their sizes differ."""
        if self.first_of_other_shape() is not None:
            return None
        height, width = self.shapes[0].tolist()
        return height, width

    def first_of_other_shape(self) -> int | None:
        """Return the index of the first image whose size differs from that of image 0, or None."""
        others = np.flatnonzero((self.shapes != self.shapes[0]).any(axis=1))
        return int(others[0]) if len(others) else None

    def read(self, index: int) -> Pixels:
        """Decode one image to a new uint8 array [C, H, W].

        Raises:
            UnreadableImage: The file cannot be decoded, or changed since the data set was scanned.
        """
        path = path_at(self.paths, index)
        with quiet_pillow():
            pixels = decode_image(path, self.spec)
        if pixels.shape[1:] != tuple(self.shapes[index]) or pixel_checksum(pixels) != self.checksums[index]:
            raise UnreadableImage(
                f"{path} changed since the data set was first read: restore the old file, or restart the job to use "
                "the new one."
            )
        return pixels

    def take(self, indices: Tensor) -> ImageFiles:
        """Return the files at `indices`, int64 [M], in that order."""
        rows = indices.numpy()
        return dataclasses.replace(
            self, paths=self.paths[rows], checksums=self.checksums[rows], shapes=self.shapes[rows], levels=None
        )


def pixel_checksum(pixels: Pixels) -> int:
    """Return the crc32c of one image's pixels, [C, H, W], row by row."""
    checksum: int = google_crc32c.value(np.ascontiguousarray(pixels))
    return checksum
