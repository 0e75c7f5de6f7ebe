"""Images of the size and the channels that were asked for, in the same bits on every machine.

Pillow's resampling is integer arithmetic; torch's depends on the vector unit. So every source resizes here.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from stages.datasets.memory import check_fits_memory
from stages.errors import DataError, cause

Pixels = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
"""What may be decoded, whatever a file is called: some of Pillow's other readers start programs (EPS: Ghostscript)."""

_MACHINE_FAULTS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class UnreadableImage(DataError):
    """An image file is damaged, gone, closed to us, or not what it was: its own fault, not the machine's."""


@dataclass(frozen=True)
class Form:
    """What a file is decoded to: `channels` 1 (grey) or 3 (RGB); where `size` is given, the centred square of `crop`
    times the shorter side, resized to [size, size] pixels; else the whole image.
    """

    channels: int
    size: int | None = None
    crop: float = 1.0


def decode_image(path: Path, form: Form) -> Pixels:
    """Decode one file to uint8 [C, H, W], an array of its own: upright (EXIF), then as `form` says.

    UnreadableImage, naming the path, if it is not a whole image of 8 bits a channel in one of FORMATS; DataError if
    this machine lacks what it takes to read it.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            _check_size(file)
            upright = ImageOps.exif_transpose(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(
            f"{path} claims more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit against decompression bombs: "
            "shrink it or take it away."
        ) from error
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise _failure(path, error) from error
    if upright.mode.startswith(("I", "F")):
        raise UnreadableImage(f"{path} has more than 8 bits a channel (mode {upright.mode}): convert it to 8 bits.")
    image = upright.convert("L" if form.channels == 1 else "RGB")
    return _channels_first(image if form.size is None else crop_and_resize(image, form.size, form.crop))


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence what Pillow warns of, such as odd EXIF tags. Filters belong to the whole process: enter it outside of
    threads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def crop_and_resize(image: Image.Image, size: int, crop: float = 1.0) -> Image.Image:
    """The centred square of `crop` times the shorter side, resized to [size, size]: bilinear, with antialiasing."""
    side = min(image.size) * crop
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def with_channels(pixels: Pixels, channels: int | None) -> Pixels:
    """Turn [N, C, H, W] into `channels` channels: grey is repeated, RGB becomes ITU-R 601 luma, in Pillow's bits."""
    if channels is None or channels == pixels.shape[1]:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=1)
    red, green, blue = (pixels[:, at : at + 1].astype(np.uint32) for at in range(3))
    luma = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return luma.astype(np.uint8)


def with_size(pixels: Pixels, size: int | None, what: str) -> Pixels:
    """Crop and resize [N, C, H, W] to [N, C, size, size]; as it is, if `size` is None or already so."""
    if size is None or pixels.shape[2:] == (size, size):
        return pixels
    resized = new_pixels((*pixels.shape[:2], size, size), what)
    for at, image in enumerate(pixels):
        layout = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
        resized[at] = _channels_first(crop_and_resize(Image.fromarray(layout), size))
    return resized


def new_pixels(shape: tuple[int, ...], what: str) -> Pixels:
    """Room for uint8 [N, C, H, W], not filled yet. DataError if this machine cannot have that much."""
    check_fits_memory(int(np.prod(shape, dtype=object)), what)
    return np.empty(shape, dtype=np.uint8)


def _check_size(file: Image.Image) -> None:
    # Pillow only warns between its limit and twice that; whether a warning is an error is not for us alone to say.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and file.width * file.height > limit:
        raise Image.DecompressionBombError


def _failure(path: Path, error: Exception) -> DataError:
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number in _MACHINE_FAULTS:
        return DataError(
            f"{path} cannot be read now ({cause(error)}), which is not the file's fault: free memory or close files, "
            "and start again."
        )
    if isinstance(error, OSError) and number is not None:
        return UnreadableImage(f"{path} cannot be read ({error.strerror}): bring it back or take it away.")
    return UnreadableImage(f"{path} cannot be decoded ({cause(error)}): replace it or take it away.")


def _channels_first(image: Image.Image) -> Pixels:
    pixels = np.asarray(image)
    return (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)).copy()
