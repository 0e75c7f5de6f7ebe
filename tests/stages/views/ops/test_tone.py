"""Tone: torchvision's own numbers, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdpipe.stages.views.ops import tone

SHAPES = [(18, 3, 16, 16), (18, 1, 9, 5), (18, 3, 1, 1), (18, 3, 40, 31), (18, 3, 2, 6)]


def random_images(batch: int, channels: int, height: int, width: int, seed: int = 3) -> Tensor:
    """Noise of several spreads, and a image of one color."""
    noise = torch.randint(0, 256, (batch, channels, height, width), generator=torch.Generator().manual_seed(seed))
    noise[1::3] = noise[1::3] // 9 + 100
    noise[0] = noise[0, :, :1, :1]
    return noise.to(torch.uint8)


def each(function: Callable[..., Tensor], images: Tensor, parameters: Tensor) -> Tensor:
    return torch.stack([function(image, value) for image, value in zip(images, parameters.tolist(), strict=True)])


@pytest.mark.parametrize("shape", SHAPES)
def test_posterize(shape: tuple[int, int, int, int]) -> None:
    images, bits = random_images(*shape), torch.arange(18) % 9

    assert tone.posterize(images, bits).equal(each(reference.posterize, images, bits))


@pytest.mark.parametrize("shape", SHAPES)
def test_solarize(shape: tuple[int, int, int, int]) -> None:
    images, thresholds = random_images(*shape), torch.linspace(0, 255, 18, dtype=torch.float64)

    assert tone.solarize(images, thresholds).equal(each(reference.solarize, images, thresholds))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_without_parameters(name: str, shape: tuple[int, int, int, int]) -> None:
    images = random_images(*shape)

    assert getattr(tone, name)(images).equal(getattr(reference, name)(images))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 255), st.integers(0, 255))
def test_autocontrast_of_any_two_levels_and_all_between(one: int, other: int) -> None:
    low, high = min(one, other), max(one, other)
    image = torch.arange(low, high + 1).to(torch.uint8).reshape(1, 1, 1, -1)

    assert tone.autocontrast(image).equal(reference.autocontrast(image))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**31))
def test_equalize_at_any_size(height: int, width: int, seed: int) -> None:
    images = random_images(4, 1, height, width, seed)

    assert tone.equalize(images).equal(reference.equalize(images))


@pytest.mark.parametrize("shape", SHAPES)
def test_sharpness_within_one_grey_level(shape: tuple[int, int, int, int]) -> None:
    images, factors = random_images(*shape), torch.linspace(0, 2, 18, dtype=torch.float64)

    off = (tone.adjust_sharpness(images, factors).int() - each(reference.adjust_sharpness, images, factors).int()).abs()

    assert off.max() <= 1
    assert (off == 0).float().mean() > 0.98  # at seventeenths, many pixels fall on whole levels


def test_every_sum_of_a_neighbourhood_is_divided_exactly() -> None:
    sums = torch.arange(13 * 255 + 1, dtype=torch.int32)

    assert (((sums + 6) * 5042) >> 16).equal(torch.round(sums / 13.0).int())


def test_sharpness_of_one_is_the_identity() -> None:
    images = random_images(4, 3, 8, 8)
    before = images.clone()

    assert tone.adjust_sharpness(images, torch.ones(4, dtype=torch.float64)).equal(before)
    tone.adjust_sharpness(images, torch.zeros(4, dtype=torch.float64))
    for function in (tone.autocontrast, tone.equalize):
        function(images)
    assert images.equal(before)


def test_a_sub_batch_gives_the_same_pixels() -> None:
    images, factors = random_images(18, 3, 12, 12), torch.linspace(0, 2, 18, dtype=torch.float64)
    order = torch.tensor([7, 2, 11])

    for function in (tone.autocontrast, tone.equalize):
        assert function(images[order]).equal(function(images)[order])
    assert tone.adjust_sharpness(images[order], factors[order]).equal(tone.adjust_sharpness(images, factors)[order])


def test_known_pixels() -> None:
    image = torch.tensor([[10, 20, 30], [40, 200, 60], [70, 80, 90]], dtype=torch.uint8).reshape(1, 1, 3, 3)

    def middle(changed: Tensor) -> int:
        return int(changed[0, 0, 1, 1])

    assert middle(tone.posterize(image, torch.tensor([2]))) == 192
    assert middle(tone.solarize(image, torch.tensor([199.5], dtype=torch.float64))) == 55
    assert tone.autocontrast(image).flatten().tolist() == [0, 13, 26, 40, 255, 67, 80, 93, 107]
    # 9 neighbors of sum 600, the middle four times more: 1400 / 13 is 108 rounded, halfway to 200 is 154
    assert middle(tone.adjust_sharpness(image, torch.tensor([0.5], dtype=torch.float64))) == 154
