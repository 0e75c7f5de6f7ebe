"""Policy for unreadable images: stop the job, or drop and report the sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdpipe.stages.errors import DataError

OnUnreadable = Literal["stop", "drop"]


@dataclass(frozen=True)
class DroppedImage:
    """An image left out of its data set, and the reason."""

    path: Path
    sample_id: int
    why: str


class DropList:
    """The images dropped from a data set, in the order found.

    Args:
        name: Name of the data set, for messages.
        num_images: Number of images before any is dropped.
        on_unreadable: "stop" or "drop".
    """

    def __init__(self, name: str, num_images: int, on_unreadable: OnUnreadable) -> None:
        self._name, self._num_images, self._on_unreadable = name, num_images, on_unreadable
        self.dropped: list[DroppedImage] = []

    def add(self, image: DroppedImage) -> None:
        """Record an unreadable image.

        Raises:
            DataError: Unreadable images stop the job, or more than half of all images are unreadable.
        """
        if self._on_unreadable == "stop":
            raise DataError(
                f"sample {image.sample_id} cannot be read: {image.why} (data.unreadable = 'drop' leaves such samples "
                "out)"
            )
        self.dropped.append(image)
        if 2 * len(self.dropped) > self._num_images:
            raise DataError(
                f"data set {self._name}: more than half of its {self._num_images} images cannot be read, the first: "
                f"{self.dropped[0].why} Is the disk still mounted?"
            )
