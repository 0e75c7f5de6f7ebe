"""Images that cannot be read: each stops the job, or is dropped from the data set and listed; never silently."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stages.errors import DataError

OnUnreadable = Literal["stop", "drop"]


@dataclass(frozen=True)
class Dropped:
    """An image that is left out of its data set, and why."""

    path: Path
    sample_id: int
    why: str


class DropList:
    """What was dropped of the `num_images` of the data set `name`, in the order in which it was found."""

    def __init__(self, name: str, num_images: int, on_unreadable: OnUnreadable) -> None:
        self._name, self._num_images, self._on_unreadable = name, num_images, on_unreadable
        self.dropped: list[Dropped] = []

    def add(self, dropped: Dropped) -> None:
        """DataError if images that cannot be read stop the job, or if they are more than half of all."""
        if self._on_unreadable == "stop":
            raise DataError(
                f"sample {dropped.sample_id} cannot be read: {dropped.why} (data.unreadable = 'drop' leaves such "
                "samples out)"
            )
        self.dropped.append(dropped)
        if 2 * len(self.dropped) > self._num_images:
            raise DataError(
                f"data set {self._name}: more than half of its {self._num_images} images cannot be read, the first: "
                f"{self.dropped[0].why} Is the disk still there?"
            )
