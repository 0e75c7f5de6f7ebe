from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets.folder import default_loader

from kdpipe.stages.data.decode import (
    DecodeSpec,
    UnreadableImage,
    crop_and_resize,
    decode_image,
    with_channels,
    with_size,
)

PHOTOGRAPH = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def _encoded(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    PHOTOGRAPH.save(file, kind, **options)
    return file.getvalue()


def _with_exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """Return a JPEG whose EXIF has these tags: (tag, type, count, 4 bytes of value)."""
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHI4s", *tag) for tag in tags) + struct.pack("<I", 0)
    payload = b"Exif\0\0II*\0" + struct.pack("<I", 8) + body
    jpeg = _encoded("JPEG")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


ON_ITS_SIDE = (0x112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize("kind", ["GIF", "AVIF", "JPEG2000", "PNG", "BMP", "WEBP", "TIFF"])
def test_files_of_any_name_are_read_as_torchvision_does(tmp_path: Path, kind: str) -> None:
    (tmp_path / "called.jpg").write_bytes(_encoded(kind))
    expected = np.asarray(default_loader(str(tmp_path / "called.jpg"))).transpose(2, 0, 1)
    assert np.array_equal(decode_image(tmp_path / "called.jpg", DecodeSpec(3)), expected)


@pytest.mark.parametrize(
    ("tags", "turned"),
    [
        ([ON_ITS_SIDE, (0x100, 2, 4, b"abc\0"), (0x9003, 2, 3, b"ab\0\0")], True),  # a number as text
        ([ON_ITS_SIDE, (0x8825, 4, 1, struct.pack("<I", 8))], True),  # GPS that points to itself
        ([(0x112, 2, 2, b"6\0\0\0")], False),
        ([(0x112, 3, 1, struct.pack("<HH", 9, 0))], False),
    ],
)
def test_odd_exif_does_not_matter(tmp_path: Path, tags: Any, turned: bool) -> None:
    (tmp_path / "a.jpg").write_bytes(_with_exif(*tags))
    expected = default_loader(str(tmp_path / "a.jpg"))
    expected = expected.transpose(Image.Transpose.ROTATE_270) if turned else expected
    assert np.array_equal(decode_image(tmp_path / "a.jpg", DecodeSpec(3)), np.asarray(expected).transpose(2, 0, 1))


def test_a_file_of_another_format_is_told_the_formats(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(_encoded("TGA"))
    with pytest.raises(UnreadableImage, match="damaged, or none of JPEG, PNG, .* JPEG2000: convert or remove it"):
        decode_image(tmp_path / "a.jpg", DecodeSpec(3))


@given(st.integers(0, 2**32 - 1))
def test_grey_from_rgb_is_pillows_to_the_bit(seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    ours = with_channels(image.transpose(2, 0, 1)[None], 1)
    assert np.array_equal(ours[0, 0], np.asarray(Image.fromarray(image).convert("L")))


def test_rgb_from_grey_repeats_it() -> None:
    gray = np.arange(24, dtype=np.uint8).reshape(2, 1, 3, 4)
    rgb = with_channels(gray, 3)
    assert rgb.shape == (2, 3, 3, 4)
    assert all(np.array_equal(rgb[:, at], gray[:, 0]) for at in range(3))


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_and_files_are_resized_alike(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, channels, 9, 14), dtype=np.uint8)
    resized = with_size(pixels, 5, "toy")
    assert resized.shape == (2, channels, 5, 5)
    for image, ours in zip(pixels, resized, strict=True):
        file = Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0).copy())
        expected = np.asarray(crop_and_resize(file, 5)).reshape(5, 5, channels).transpose(2, 0, 1)
        assert np.array_equal(ours, expected)


def test_probability_zero_changes_nothing() -> None:
    pixels = np.zeros((1, 3, 8, 8), dtype=np.uint8)
    assert with_size(pixels, None, "toy") is pixels
    assert with_size(pixels, 8, "toy") is pixels
    assert with_channels(pixels, None) is pixels
    assert with_channels(pixels, 3) is pixels


def test_the_middle_of_the_longer_side_is_kept() -> None:
    wide = np.zeros((4, 12), dtype=np.uint8)
    wide[:, 4:8] = 200
    assert np.all(np.asarray(crop_and_resize(Image.fromarray(wide), 4)) == 200)


def test_shrinking_averages_instead_of_skipping_pixels() -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (32, 16))
    shrunk = np.asarray(crop_and_resize(Image.fromarray(stripes), 4))
    assert np.all(np.abs(shrunk.astype(int) - 127) <= 20)
