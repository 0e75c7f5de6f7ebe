"""Scan the images of a folder: decode each once, into memory if all fit, else for its checksum and shape.

Results for files that are not kept in memory are cached (`image_index.py`), so that the next job need not decode them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from kdpipe.stages.data.decode import PixelCache, Pixels, UnreadableImage, decode_image, quiet_pillow
from kdpipe.stages.data.image_files import ImageFileList, ImageFiles, pixel_checksum
from kdpipe.stages.data.scan_cache import CHUNK, NO_STAMP, ScanState, Stamp, is_settled, scan_threads, stamp
from kdpipe.stages.data.splits import Indices
from kdpipe.stages.data.unreadable import DropList, DroppedImage, OnUnreadable

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
    on_unreadable: OnUnreadable = "stop",
    on_image: OnImage | None = None,
) -> ScanResult:
    """Scan the files at `indices`, int64 [N], in threads; the number of threads does not change the result.

    Args:
        files: All files of the split.
        indices: The files to scan.
        cache_bytes: Keep the pixels in memory if all images have one size and take no more than this.
        on_unreadable: "stop" or "drop".
        on_image: Called with (done, N) from time to time; may raise to abort.

    Raises:
        DataError: An image cannot be read and `on_unreadable` is "stop", or more than half cannot be read.
    """
    chosen = files.take(indices)
    pixel_cache = PixelCache(len(chosen), cache_bytes, f"data set {files.name}")
    state = ScanState(files, chosen, pixel_cache)
    drops = DropList(files.name, len(chosen), on_unreadable)
    try:
        with closing(_scan(chosen, pixel_cache, state, on_image or (lambda done, total: None))) as scanned:
            for index, image in scanned:
                if image.why is None:
                    state.add(index, image.stamp, image.checksum, image.shape)
                else:
                    state.discard(index)
                    drops.add(DroppedImage(chosen.paths[index], int(chosen.sample_ids[index]), image.why))
    finally:
        if not pixel_cache.active:
            state.save()
    kept = np.flatnonzero(state.image_batch)
    if pixel_cache.active:
        return ScanResult(pixel_cache.take(kept), kept, tuple(drops.dropped))
    readable = chosen.take(kept) if drops.dropped else chosen
    images = ImageFiles(readable.paths, readable.spec, state.checksums[kept], state.shapes[kept])
    return ScanResult(images, kept, tuple(drops.dropped))


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
    with quiet_pillow(), scan_threads() as pool:
        for start in range(0, len(chosen), CHUNK):
            chunk = np.arange(start, min(start + CHUNK, len(chosen)))
            todo = (chunk if pixel_cache.active else chunk[~state.image_batch[chunk]]).tolist()
            results = pool.map(lambda index: _scan_one(chosen, pixel_cache, index), todo)
            for index, image in zip(todo, results, strict=True):
                yield index, image
                if time.monotonic() - reported_at >= REPORT_EVERY_S:
                    on_image(index + 1, len(chosen))
                    reported_at = time.monotonic()
            if not pixel_cache.active:
                state.save_periodically()
    on_image(len(chosen), len(chosen))


def _scan_one(chosen: ImageFileList, pixel_cache: PixelCache, index: int) -> _Scanned:
    path = chosen.paths[index]
    now_ns, before = time.time_ns(), stamp(path)  # before decoding: a change meanwhile gives the file another stamp
    try:
        image = decode_image(path, chosen.spec)
    except UnreadableImage as error:
        return _Scanned(why=str(error))
    pixel_cache.put(index, image)
    return _Scanned(
        before if is_settled(before, now_ns) else NO_STAMP, pixel_checksum(image), (image.shape[1], image.shape[2])
    )
