"""Images of the size and the channels that were asked for, in the same bits on every machine.

Pillow's resampling is integer arithmetic; torch's depends on the vector unit. So every source resizes here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from stages.cause import cause
from stages.datasets.memory import check_fits_memory
from stages.errors import DataError

Pixels = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
"""What may be decoded, whatever a file is called: some of Pillow's other readers start programs (EPS: Ghostscript)."""


def decode_image(path: Path, channels: int, size: int | None) -> Pixels:
    """Decode one file to uint8 [C, H, W]: upright (EXIF), grey or RGB, cropped and resized to `size` if given.

    DataError, naming the path, if it is not a whole image of 8 bits a channel in one of FORMATS.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            upright = ImageOps.exif_transpose(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{path} claims more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit against decompression bombs: "
            "shrink it or take it away."
        ) from error
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise DataError(f"{path} cannot be decoded ({cause(error)}): replace it or take it away.") from error
    if upright.mode.startswith(("I", "F")):
        raise DataError(f"{path} has more than 8 bits a channel (mode {upright.mode}): convert it to 8 bits.")
    image = upright.convert("L" if channels == 1 else "RGB")
    return _channels_first(image if size is None else crop_and_resize(image, size))


def crop_and_resize(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square of the image, resized to [size, size]: bilinear, with antialiasing."""
    side = min(image.size)
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


def _channels_first(image: Image.Image) -> Pixels:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
