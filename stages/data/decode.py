"""Decode images, convert channels and sizes, and hold pixels in memory; the same bits on every machine.

Pillow's resampling is integer arithmetic, torch's depends on the vector unit, so every source resizes here.
"""

from __future__ import annotations

import errno
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from kdpipe.stages.data.splits import Indices
from kdpipe.stages.errors import DataError, cause
from kdpipe.stages.runtime.memory import installed_bytes

Pixels = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "AVIF", "JPEG2000")
"""Formats allowed regardless of file name: some of Pillow's other readers start programs (EPS: Ghostscript)."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""

_MACHINE_FAULTS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_GIB = 2**30


class UnreadableImage(DataError):
    """An image file is damaged, missing, not permitted or changed: a fault of the file, not of the machine."""


@dataclass(frozen=True)
class DecodeSpec:
    """The format that files are decoded to.

    Attributes:
        channels: 1 (grayscale) or 3 (RGB).
        size: Side of the square output in pixels; None keeps the whole image.
        crop: With `size`, side of the centered square that is resized, as a fraction of the shorter side.
    """

    channels: int
    size: int | None = None
    crop: float = 1.0


def decode_image(path: str | Path, spec: DecodeSpec, opened: Callable[[], BinaryIO] | None = None) -> Pixels:
    """Decode one image to a new uint8 array [C, H, W]: EXIF orientation applied, then converted to `spec`.

    Args:
        path: Where the image is: the file, or, for messages only, its place in what `opened` reads from.
        spec: The format.
        opened: Returns its bytes; may raise OSError.

    Raises:
        UnreadableImage: The file is not a complete image of 8 bits per channel in one of FORMATS.
        DataError: This machine lacks the resources to read it.
    """
    try:
        with Image.open(path if opened is None else opened(), formats=FORMATS) as file:
            _check_size(file)
            file.load()
            method = _UPRIGHT.get(_orientation(file))
            upright = file if method is None else file.transpose(method)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(
            f"{path} has more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit against decompression bombs: "
            "shrink or remove it."
        ) from error
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise _failure(path, error) from error
    if upright.mode.startswith(("I", "F")):
        raise UnreadableImage(f"{path} has more than 8 bits per channel (mode {upright.mode}): convert it to 8 bits.")
    mode = "L" if spec.channels == 1 else "RGB"
    image = upright if upright.mode == mode else upright.convert(mode)  # `convert` would copy it
    return _channels_first(image if spec.size is None else crop_and_resize(image, spec.size, spec.crop))


def _orientation(file: Image.Image) -> Any:
    """Return the EXIF orientation, 1 if EXIF cannot be read. ImageOps.exif_transpose writes it again, and may fail."""
    try:
        return file.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of odd EXIF anything
        return 1


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Suppress Pillow's warnings, such as for odd EXIF tags.

    Filters are process-wide: enter this outside of threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def crop_and_resize(image: Image.Image, size: int, crop: float = 1.0) -> Image.Image:
    """Crop the centered square of `crop` times the shorter side and resize it: bilinear, antialiased."""
    side = min(image.size) * crop
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def with_channels(pixels: Pixels, channels: int | None) -> Pixels:
    """Convert [N, C, H, W] to `channels` channels: gray is repeated, RGB becomes ITU-R 601 luma in Pillow's bits."""
    if channels is None or channels == pixels.shape[1]:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=1)
    red, green, blue = (pixels[:, channel : channel + 1].astype(np.uint32) for channel in range(3))
    luma = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return luma.astype(np.uint8)


def with_size(pixels: Pixels, size: int | None, what: str) -> Pixels:
    """Crop and resize [N, C, H, W] to [N, C, size, size], unless `size` is None or already matches."""
    if size is None or pixels.shape[2:] == (size, size):
        return pixels
    resized = new_pixels((*pixels.shape[:2], size, size), what)
    for index, image in enumerate(pixels):
        layout = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
        resized[index] = _channels_first(crop_and_resize(Image.fromarray(layout), size))
    return resized


def new_pixels(shape: tuple[int, ...], what: str) -> Pixels:
    """Allocate uninitialized uint8 [N, C, H, W]. Raises DataError if it exceeds this machine's installed memory."""
    num_bytes = math.prod(shape)
    if num_bytes > installed_bytes():
        raise DataError(
            f"{what} needs {num_bytes / _GIB:.1f} GiB of memory, this machine has {installed_bytes() / _GIB:.1f} GiB: "
            "set a smaller data.image_size or data.num_train, or, for imagefolder:PATH, data.cache_bytes."
        )
    return np.empty(shape, dtype=np.uint8)


class PixelCache:
    """Memory for the decoded images of a folder, if all have one size and fit into `max_bytes` together.

    Whether images are cached depends neither on the order nor on the number of threads that put them.
    """

    def __init__(self, num_images: int, max_bytes: int, what: str) -> None:
        self._num_images, self._max_bytes, self._what = num_images, max_bytes, what
        self._lock = threading.Lock()
        self._pixels: Pixels | None = None
        self._shape: tuple[int, ...] | None = None
        self.active = True

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether images of this shape, [C, H, W], can be cached; if not, deactivate the cache."""
        num_bytes = self._num_images * math.prod(shape)
        if self._shape not in (None, shape) or num_bytes > self._max_bytes:
            self.deactivate()
        return self.active

    def deactivate(self) -> None:
        """Free the cached pixels and accept no more."""
        self.active, self._pixels = False, None

    def put(self, index: int, image: Pixels) -> None:
        """Store `image`, [C, H, W], if the cache is active. Raises DataError if memory is too small."""
        with self._lock:
            if not self.active or not self.fits(image.shape):
                return
            if self._pixels is None:
                self._pixels, self._shape = new_pixels((self._num_images, *image.shape), self._what), image.shape
            pixels = self._pixels
        pixels[index] = image

    def take(self, kept: Indices) -> Pixels:
        """Return the images at `kept`, ascending int64 [M], as uint8 [M, C, H, W]; compacts in place."""
        assert self.active and self._pixels is not None
        if len(kept) < self._num_images:
            for target, index in enumerate(kept.tolist()):  # in place: a second copy may not fit
                self._pixels[target] = self._pixels[index]
        return self._pixels[: len(kept)]


class LevelCounts(PixelCache):
    """The gray levels of the images that a `PixelCache` would hold, counted instead of kept.

    Attributes:
        counts: How often each level occurs in each channel, int64 [C, 256].
    """

    def __init__(self, num_images: int, max_bytes: int, what: str) -> None:
        super().__init__(num_images, max_bytes, what)
        self.counts: npt.NDArray[np.int64] | None = None

    def put(self, index: int, image: Pixels) -> None:
        """Count the levels of `image`, [C, H, W], if it would be kept."""
        levels = np.stack([np.bincount(channel.reshape(-1), minlength=256) for channel in image])
        with self._lock:
            if self.active and self.fits(image.shape):
                self._shape = image.shape
                self.counts = levels if self.counts is None else self.counts + levels


def _check_size(file: Image.Image) -> None:
    # Pillow only warns between its limit and twice that, and its warning filter is process-wide.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and file.width * file.height > limit:
        raise Image.DecompressionBombError


def _failure(path: str | Path, error: Exception) -> DataError:
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number in _MACHINE_FAULTS:
        return DataError(
            f"{path} cannot be read now ({cause(error)}): this machine ran out of memory or file handles. Free some "
            "and start again."
        )
    if isinstance(error, OSError) and number is not None:
        return UnreadableImage(f"{path} cannot be read ({error.strerror}): restore or remove it.")
    if isinstance(error, UnidentifiedImageError):
        return UnreadableImage(
            f"{path} cannot be decoded: it is damaged, or none of {', '.join(FORMATS)}: convert or remove it."
        )
    return UnreadableImage(f"{path} cannot be decoded ({cause(error)}): replace or remove it.")


def _channels_first(image: Image.Image) -> Pixels:
    # Channel by channel, without images in between: half the time of stacking those of `split`.
    planes = bytearray().join(image.tobytes("raw", band) for band in image.getbands())
    return np.frombuffer(planes, dtype=np.uint8).reshape(-1, image.height, image.width)
