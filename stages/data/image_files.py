"""Images that stay where they are and are decoded on access: more than memory holds, or of unequal sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from torch import Tensor

from kdpipe.stages.data.decode import DecodeSpec, Pixels, UnreadableImage, quiet_pillow
from kdpipe.stages.data.image_source import ImageSource
from kdpipe.stages.data.splits import Indices


@dataclass(frozen=True, eq=False)
class ImageFileList:
    """N images of the data set `name`, not decoded yet; `sample_ids` int64 [N].

    Attributes:
        folder: What the scan is cached by: the folder that the images are in, with the split if it holds several.
    """

    name: str
    folder: Path
    source: ImageSource
    sample_ids: Indices
    spec: DecodeSpec

    def __len__(self) -> int:
        return len(self.source)

    def take(self, indices: Indices) -> ImageFileList:
        """Return the files at `indices`, int64 [M], in that order."""
        return dataclasses.replace(self, source=self.source.take(indices), sample_ids=self.sample_ids[indices])


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """N scanned images that are decoded on access. All data is in arrays, which forked workers share.

    Attributes:
        checksums: crc32c of each decoded image's [C, H, W] bytes when the data set was scanned: uint32 [N].
        shapes: (H, W) of each decoded image: int32 [N, 2].
        levels: How often each gray level occurs in each channel, int64 [C, 256], where a run would keep the images in
            memory; None for those that stay files.
    """

    source: ImageSource
    spec: DecodeSpec
    checksums: npt.NDArray[np.uint32]
    shapes: npt.NDArray[np.int32]
    levels: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.source)

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
        with quiet_pillow():
            pixels = self.source.decode(index, self.spec)
        if pixels.shape[1:] != tuple(self.shapes[index]) or pixel_checksum(pixels) != self.checksums[index]:
            raise UnreadableImage(
                f"{self.source.where(index)} changed since the data set was first read: restore the old file, or "
                "restart the job to use the new one."
            )
        return pixels

    def take(self, indices: Tensor) -> ImageFiles:
        """Return the files at `indices`, int64 [M], in that order."""
        rows = indices.numpy()
        return dataclasses.replace(
            self, source=self.source.take(rows), checksums=self.checksums[rows], shapes=self.shapes[rows], levels=None
        )


def pixel_checksum(pixels: npt.NDArray[Any]) -> int:
    """Return the crc32c of one image's pixels, [C, H, W], row by row; or of other numbers."""
    checksum: int = google_crc32c.value(np.ascontiguousarray(pixels))
    return checksum
