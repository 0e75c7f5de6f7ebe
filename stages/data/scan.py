"""Scan the images of a folder: decode each once, into memory if all fit, else for its checksum and shape.

Results for files that are not kept in memory are cached (`scan_cache.py`), so that the next job need not decode them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from kdpipe.stages.data.decode import LevelCounts, PixelCache, Pixels, UnreadableImage, quiet_pillow
from kdpipe.stages.data.image_files import ImageFileList, ImageFiles, pixel_checksum
from kdpipe.stages.data.image_set import DroppedImage
from kdpipe.stages.data.image_source import NO_STAMP, Stamp
from kdpipe.stages.data.scan_cache import CHUNK, ScanState, is_settled, scan_threads
from kdpipe.stages.data.splits import Indices
from kdpipe.stages.errors import DataError

OnImage = Callable[[int, int], None]

REPORT_EVERY_S = 0.2


@dataclass(frozen=True, eq=False)
class ScanResult:
    """The readable images at `kept`, ascending int64 [M]: pixels uint8 [M, C, H, W], or files [M]."""

    images: Pixels | ImageFiles
    kept: Indices
    dropped: tuple[DroppedImage, ...]


def scan_images(
    files: ImageFileList,
    indices: Indices,
    *,
    cache_bytes: int,
    keep: bool = True,
    drop_unreadable: bool = False,
    on_image: OnImage | None = None,
) -> ScanResult:
    """Scan the files at `indices`, int64 [N], of a split in threads; the number of threads does not change the result.

    Args:
        cache_bytes: Keep the pixels in memory if all images have one size and take no more than this.
        keep: Whether to do so; otherwise their gray levels are counted.
        drop_unreadable: Leave unreadable images out, instead of raising an error.
        on_image: Called with (done, N) from time to time; may raise to abort.

    Raises:
        DataError: An image cannot be read and none may be dropped, or more than half cannot be read.
    """
    chosen = files.take(indices)
    pixel_cache = (PixelCache if keep else LevelCounts)(len(chosen), cache_bytes, f"data set {files.name}")
    state, spec = ScanState(files, chosen), files.spec
    if spec.size is None or not pixel_cache.fits((spec.channels, spec.size, spec.size)):
        shapes = state.restore(chosen)
        if len(shapes) > 1 or (shapes and not pixel_cache.fits((spec.channels, *shapes[0]))):
            pixel_cache.deactivate()
    dropped: list[DroppedImage] = []
    try:
        with closing(_scan(chosen, pixel_cache, state, on_image or (lambda done, total: None))) as scanned:
            for index, image in scanned:
                if image.why is None:
                    state.add(index, image.stamp, image.checksum, image.shape)
                    continue
                state.readable[index] = False
                dropped.append(DroppedImage(chosen.source.where(index), int(chosen.sample_ids[index]), image.why))
                _check_dropped(files.name, dropped, len(chosen), drop_unreadable)
    finally:
        if not pixel_cache.active:
            state.save()
    kept = np.flatnonzero(state.readable)
    counts = pixel_cache.counts if isinstance(pixel_cache, LevelCounts) and pixel_cache.active else None
    if pixel_cache.active and counts is None:
        return ScanResult(pixel_cache.take(kept), kept, tuple(dropped))
    readable, entries = chosen.take(kept) if dropped else chosen, state.entries[kept]
    images = ImageFiles(readable.source, spec, entries["checksum"].copy(), entries["shape"].copy(), counts)
    return ScanResult(images, kept, tuple(dropped))


def _check_dropped(name: str, dropped: list[DroppedImage], num_images: int, drop_unreadable: bool) -> None:
    if not drop_unreadable:
        raise DataError(
            f"sample {dropped[0].sample_id} cannot be read: {dropped[0].why} (data.unreadable = 'drop' leaves such "
            "samples out)"
        )
    if 2 * len(dropped) > num_images:
        raise DataError(
            f"data set {name}: more than half of its {num_images} images cannot be read, the first: {dropped[0].why} "
            "Is the disk still mounted?"
        )


@dataclass(frozen=True)
class _Scanned:
    """The result for one image, or `why` it cannot be read."""

    stamp: Stamp = NO_STAMP
    checksum: int = 0
    shape: tuple[int, int] = (0, 0)
    why: str | None = None


def _scan(
    chosen: ImageFileList, pixel_cache: PixelCache, state: ScanState, on_image: OnImage
) -> Generator[tuple[int, _Scanned], None, None]:
    """Scan all images while `pixel_cache` is active, else only the unknown ones; yield (index, result), ascending."""
    reported_at = time.monotonic()
    with quiet_pillow(), scan_threads() as map_threads:
        for start in range(0, len(chosen), CHUNK):
            chunk = np.arange(start, min(start + CHUNK, len(chosen)))
            todo = (chunk if pixel_cache.active else chunk[~state.readable[chunk]]).tolist()
            results = map_threads(lambda index: _scan_image(chosen, pixel_cache, index), todo)
            for index, image in zip(todo, results, strict=True):
                yield index, image
                if time.monotonic() - reported_at >= REPORT_EVERY_S:
                    on_image(index + 1, len(chosen))
                    reported_at = time.monotonic()
            if not pixel_cache.active:
                state.save_periodically()
    on_image(len(chosen), len(chosen))


def _scan_image(chosen: ImageFileList, pixel_cache: PixelCache, index: int) -> _Scanned:
    now_ns = time.time_ns()
    before = chosen.source.stamp(index)  # before decoding: a change meanwhile gives the file another stamp
    try:
        image = chosen.source.decode(index, chosen.spec)
    except UnreadableImage as error:
        return _Scanned(why=str(error))
    pixel_cache.put(index, image)
    settled = before if is_settled(before, now_ns) else NO_STAMP
    return _Scanned(settled, pixel_checksum(image), (image.shape[1], image.shape[2]))
