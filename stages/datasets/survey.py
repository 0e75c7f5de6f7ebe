"""One look at every image of a folder: into memory if they may be held there, else for its checksum and shape alone.

What is learnt of files that are not held is kept in an index (`image_index.py`), so that the next job need not look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from stages.datasets.dropped import DropList, Dropped, OnUnreadable
from stages.datasets.held_pixels import HeldPixels
from stages.datasets.image_files import ImageFiles, pixel_checksum
from stages.datasets.image_index import NO_STAMP, Stamp, is_settled, stamp
from stages.datasets.photographs import Photographs
from stages.datasets.pixels import Pixels, UnreadableImage, decode_image, quiet_pillow
from stages.datasets.split import Rows
from stages.datasets.survey_notes import SurveyNotes
from stages.datasets.threads import CHUNK, threads

OnImage = Callable[[int, int], None]

TELL_EVERY_S = 0.2


@dataclass(frozen=True, eq=False)
class Surveyed:
    """The images at positions `kept` [M], ascending, of those asked for: pixels uint8 [M, C, H, W], or files [M]."""

    images: Pixels | ImageFiles
    kept: Rows
    dropped: tuple[Dropped, ...]


def survey(
    photographs: Photographs,
    rows: Rows,
    *,
    held_bytes: int,
    on_unreadable: OnUnreadable = "stop",
    on_image: OnImage | None = None,
) -> Surveyed:
    """Look at the `photographs` at `rows`, int64 [N], in threads that change no bit of what is found.

    They are held if they are all of one size and take no more than `held_bytes`. `on_image` is told (done, N) now and
    then, and may raise to break off. DataError, naming path and sample id, for an image that cannot be read if
    `on_unreadable` is "stop", and in any case if those are more than half.
    """
    chosen = photographs.take(rows)
    held = HeldPixels(len(chosen), held_bytes, f"data set {photographs.name}")
    notes = SurveyNotes(photographs, chosen, held)
    drops = DropList(photographs.name, len(chosen), on_unreadable)
    try:
        with closing(_looks(chosen, held, notes, on_image or (lambda done, total: None))) as looks:
            for at, look in looks:
                if look.why is None:
                    notes.add(at, look.stamp, look.checksum, look.shape)
                else:
                    notes.forget(at)
                    drops.add(Dropped(chosen.paths[at], int(chosen.sample_ids[at]), look.why))
    finally:
        if not held.wanted:
            notes.save()
    kept = np.flatnonzero(notes.seen)
    if held.wanted:
        return Surveyed(held.taken(kept), kept, tuple(drops.dropped))
    left = chosen.take(kept) if drops.dropped else chosen
    files = ImageFiles(left.paths, left.form, notes.checksums[kept], notes.shapes[kept])
    return Surveyed(files, kept, tuple(drops.dropped))


@dataclass(frozen=True)
class _Look:
    """What one image turned out to be, or `why` it cannot be read."""

    stamp: Stamp = NO_STAMP
    checksum: int = 0
    shape: tuple[int, int] = (0, 0)
    why: str | None = None


def _looks(
    chosen: Photographs, held: HeldPixels, notes: SurveyNotes, on_image: OnImage
) -> Generator[tuple[int, _Look], None, None]:
    """(position, look) of all images if they are to be held, else of those that are not known yet; ascending."""
    told_at = time.monotonic()
    with quiet_pillow(), threads() as pool:
        for start in range(0, len(chosen), CHUNK):
            chunk = np.arange(start, min(start + CHUNK, len(chosen)))
            todo = (chunk if held.wanted else chunk[~notes.seen[chunk]]).tolist()
            for at, look in zip(todo, pool.map(lambda at: _look(chosen, held, at), todo), strict=True):
                yield at, look
                if time.monotonic() - told_at >= TELL_EVERY_S:
                    on_image(at + 1, len(chosen))
                    told_at = time.monotonic()
            if not held.wanted:
                notes.save_now_and_then()
    on_image(len(chosen), len(chosen))


def _look(chosen: Photographs, held: HeldPixels, at: int) -> _Look:
    """Decode the image at `at`, once: it is offered to `held`, and what is left of it is small."""
    path = chosen.paths[at]
    now_ns, before = time.time_ns(), stamp(path)  # before: if the file changes meanwhile, its new stamp is not this one
    try:
        image = decode_image(path, chosen.form)
    except UnreadableImage as error:
        return _Look(why=str(error))
    held.offer(at, image)
    return _Look(
        before if is_settled(before, now_ns) else NO_STAMP, pixel_checksum(image), (image.shape[1], image.shape[2])
    )
