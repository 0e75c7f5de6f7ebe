"""What a survey knows of each image so far: from the index of an earlier job, and from looking."""

from __future__ import annotations

import os
import time

import numpy as np
import numpy.typing as npt

from stages.datasets.held_pixels import HeldPixels
from stages.datasets.image_index import (
    NO_STAMP,
    ImageIndex,
    Stamp,
    empty_index,
    index_path,
    read_index,
    stamp,
    write_index,
)
from stages.datasets.photographs import Photographs
from stages.datasets.threads import CHUNK, threads

SAVE_EVERY_S = 120.0
"""About what a job that is killed has to look at again."""


class SurveyNotes:
    """Of the images `chosen` [N] of a folder: `seen` bool [N], whether one is known and can be read; its `checksums`
    uint32 [N]; its `shapes` int32 [N, 2]. Those in the index that still hold are seen from the start.
    """

    def __init__(self, photographs: Photographs, chosen: Photographs, held: HeldPixels) -> None:
        self._all_ids, self._ids = photographs.sample_ids, chosen.sample_ids
        self._path = index_path(photographs.folder, photographs.form, os.environ)
        self._unsaved, self._saved_at = False, time.monotonic()
        self.seen = np.zeros(len(chosen), dtype=np.bool_)
        self.checksums = np.zeros(len(chosen), dtype=np.uint32)
        self.shapes = np.zeros((len(chosen), 2), dtype=np.int32)
        self._stamps = np.full((len(chosen), 3), NO_STAMP, dtype=np.int64)
        form = photographs.form
        surely_held = form.size is not None and held.fits((form.channels, form.size, form.size))
        index = empty_index() if surely_held else read_index(self._path)
        if len(index):
            self._recall(index, chosen, held)

    def _recall(self, index: ImageIndex, chosen: Photographs, held: HeldPixels) -> None:
        """Take from the index what still holds; if the sizes in it forbid to hold images, say so to `held`."""
        found = index.find(self._ids, _stamps(chosen))
        self.seen = found >= 0
        entries = index.take(found[self.seen])
        self.checksums[self.seen], self.shapes[self.seen] = entries.checksums, entries.shapes
        self._stamps[self.seen] = entries.stamps
        shapes = np.unique(entries.shapes, axis=0).tolist()
        if len(shapes) > 1 or (shapes and not held.fits((chosen.form.channels, *shapes[0]))):
            held.give_up()

    def add(self, at: int, one: Stamp, checksum: int, shape: tuple[int, int]) -> None:
        """Note what the image at `at` decoded to; with NO_STAMP it is not remembered beyond this job."""
        self.seen[at], self._stamps[at], self.checksums[at], self.shapes[at] = True, one, checksum, shape
        self._unsaved = True

    def forget(self, at: int) -> None:
        """The image at `at` cannot be read."""
        self.seen[at] = False

    def save_now_and_then(self) -> None:
        if time.monotonic() - self._saved_at >= SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write what was found into the index, beside what that knows of other files that are still listed."""
        if not self._unsaved:
            return
        fit = self.seen & (self._stamps != NO_STAMP).all(axis=1)
        found = ImageIndex(self._ids[fit], self._stamps[fit], self.checksums[fit], self.shapes[fit])
        if len(found):
            known = read_index(self._path)
            write_index(self._path, known.take(np.isin(known.ids, self._all_ids)).updated(found))
        self._unsaved, self._saved_at = False, time.monotonic()


def _stamps(chosen: Photographs) -> npt.NDArray[np.int64]:
    """The stamp of each file, int64 [N, 3], asked for in threads: a network's disk answers slowly, but many at once."""

    def of_chunk(start: int) -> list[Stamp]:
        return [stamp(chosen.paths[at]) for at in range(start, min(start + CHUNK, len(chosen)))]

    with threads() as pool:
        parts = pool.map(of_chunk, range(0, len(chosen), CHUNK))
        return np.array([one for part in parts for one in part], dtype=np.int64)
