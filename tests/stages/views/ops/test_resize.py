from __future__ import annotations

import numpy as np
import PIL
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdpipe.stages.views.ops.resize import resize

FIRST_PASS_IS_HORIZONTAL = int(PIL.__version__.partition(".")[0]) < 13
SIDES = st.integers(1, 40)


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 2**32 - 1))
def test_pixels_are_pillows(height: int, width: int, new_height: int, new_width: int, seed: int) -> None:
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (2, 3, height, width), dtype=np.uint8))
    resized = resize(images, (new_height, new_width))
    for image, ours in zip(images, resized, strict=True):
        file = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
            (new_width, new_height), Image.Resampling.BILINEAR
        )
        pixels = ours.permute(1, 2, 0).numpy()
        if FIRST_PASS_IS_HORIZONTAL:
            assert np.array_equal(pixels, np.asarray(file))
        assert np.abs(pixels.astype(int) - np.asarray(file)).max() <= 1


def test_equal_sizes_and_no_images_are_left_alone() -> None:
    images = torch.zeros(2, 1, 5, 5, dtype=torch.uint8)
    assert resize(images, (5, 5)) is images
    assert resize(images[:0], (3, 3)).shape == (0, 1, 3, 3)
