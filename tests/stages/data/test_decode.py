from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdpipe.stages.data.decode import crop_and_resize, with_channels, with_size


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
