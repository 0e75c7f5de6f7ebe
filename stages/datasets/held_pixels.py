"""Room for the pixels of a folder's images, for as long as they may be held in memory."""

from __future__ import annotations

import math
import threading

from stages.datasets.pixels import Pixels, new_pixels
from stages.datasets.split import Rows


class HeldPixels:
    """Holds `num_images` decoded images if they are all of one size and take no more than `most_bytes` together.

    Neither order nor number of the threads that offer images matters to whether they are held. `what` names the data
    set in errors.
    """

    def __init__(self, num_images: int, most_bytes: int, what: str) -> None:
        self._num_images, self._most_bytes, self._what = num_images, most_bytes, what
        self._lock = threading.Lock()
        self._pixels: Pixels | None = None
        self.wanted = True

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether images of this shape, [C, H, W], could be held; if not, none is wanted any more."""
        num_bytes = self._num_images * math.prod(shape)
        same = self._pixels is None or self._pixels.shape[1:] == shape
        if not same or num_bytes > self._most_bytes:
            self.give_up()
        return self.wanted

    def give_up(self) -> None:
        """Let go of what is held, and want no more."""
        self.wanted, self._pixels = False, None

    def offer(self, at: int, image: Pixels) -> None:
        """Keep `image`, [C, H, W], at position `at`, unless no images are wanted. DataError if memory cannot do."""
        with self._lock:
            if not self.wanted or not self.fits(image.shape):
                return
            if self._pixels is None:
                self._pixels = new_pixels((self._num_images, *image.shape), self._what)
            pixels = self._pixels
        pixels[at] = image

    def taken(self, kept: Rows) -> Pixels:
        """The images at `kept`, ascending positions [M], in the room of all: uint8 [M, C, H, W]."""
        assert self.wanted and self._pixels is not None
        if len(kept) < self._num_images:
            for to, at in enumerate(kept.tolist()):  # in place: there may be no room for a second copy
                self._pixels[to] = self._pixels[at]
        return self._pixels[: len(kept)]
