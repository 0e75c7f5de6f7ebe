"""Photographs that stay on disk and are decoded when they are needed: more than memory holds, and of unequal sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import google_crc32c
import numpy as np
import numpy.typing as npt
from torch import Tensor

from stages.datasets.paths import Paths
from stages.datasets.pixels import Form, Pixels, UnreadableImage, decode_image, quiet_pillow


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """N image files, and what they were decoded to when the data set was first read.

    `checksums` uint32 [N]: the crc32c of each decoded image's [C, H, W] bytes; `shapes` int32 [N, 2]: its (H, W).
    All of it lies in arrays, which forked workers share.
    """

    paths: Paths
    form: Form
    checksums: npt.NDArray[np.uint32]
    shapes: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def channels(self) -> int:
        return self.form.channels

    @property
    def size(self) -> int | None:
        """The side in pixels to which each image is cropped and resized; None where it keeps its own size."""
        return self.form.size

    @cached_property
    def common_shape(self) -> tuple[int, int] | None:
        """(H, W) of all images; None if they are of unequal size."""
        if self.first_of_other_shape() is not None:
            return None
        height, width = self.shapes[0].tolist()
        return height, width

    def first_of_other_shape(self) -> int | None:
        """Where the first image stands whose size is not that of the image at 0; None if there is none."""
        others = np.flatnonzero((self.shapes != self.shapes[0]).any(axis=1))
        return int(others[0]) if len(others) else None

    def read(self, at: int) -> Pixels:
        """Decode the image at position `at` to uint8 [C, H, W], an array of its own.

        UnreadableImage (a DataError), naming the path, if it cannot be decoded, or was edited since.
        """
        path = self.paths[at]
        with quiet_pillow():
            pixels = decode_image(path, self.form)
        if pixels.shape[1:] != tuple(self.shapes[at]) or pixel_checksum(pixels) != self.checksums[at]:
            raise UnreadableImage(
                f"{path} has other pixels than when the data set was first read: put the old file back, or start the "
                "job again to take the new one."
            )
        return pixels

    def take(self, rows: Tensor) -> ImageFiles:
        """The files at `rows`, int64 [M], in that order."""
        at = rows.numpy()
        return dataclasses.replace(
            self, paths=self.paths.take(at), checksums=self.checksums[at], shapes=self.shapes[at]
        )


def pixel_checksum(pixels: Pixels) -> int:
    """The crc32c of one image's pixels, [C, H, W], row by row."""
    checksum: int = google_crc32c.value(pixels.tobytes())
    return checksum
