"""Color: torchvision's numbers within a gray level, the same pixels in any batch, and the ranges a recipe asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from kdpipe.stages.views.ops import color, rows
from kdpipe.stages.views.ops.color import ColorJitter, RandomGrayscale
from kdpipe.stages.views.rng import CounterRNG

JITTER = ColorJitter(name="ColorJitter", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)


def random_images(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Noise, and a image of one color."""
    noise = torch.randint(0, 256, (batch, channels, height, width), generator=torch.Generator().manual_seed(3))
    noise[0] = noise[0, :, :1, :1]
    return noise.to(torch.uint8)


def draw(batch: int, view: int = 0) -> CounterRNG:
    return CounterRNG(seed=5, view=view, sample_ids=torch.arange(batch))


def difference(ours: Tensor, expected_function: Tensor) -> Tensor:
    return (ours.int() - expected_function.int()).abs()


@pytest.mark.parametrize("shape", [(20, 3, 16, 16), (20, 1, 9, 5), (20, 3, 1, 1), (20, 3, 7, 12)])
@pytest.mark.parametrize(
    ("ours", "expected_function", "low", "high"),
    [
        (color.adjust_brightness, reference.adjust_brightness, 0.0, 3.0),
        (color.adjust_contrast, reference.adjust_contrast, 0.0, 3.0),
        (color.adjust_saturation, reference.adjust_saturation, 0.0, 3.0),
        (color.adjust_hue, reference.adjust_hue, -0.5, 0.5),
    ],
)
def test_adjustments_are_torchvisions_within_one_grey_level(
    ours: Callable[[Tensor, Tensor], Tensor],
    expected_function: Callable[[Tensor, float], Tensor],
    low: float,
    high: float,
    shape: tuple[int, int, int, int],
) -> None:
    images = random_images(*shape)
    factors = torch.linspace(low, high, len(images), dtype=torch.float64)

    wanted = torch.stack(
        [expected_function(image, factor) for image, factor in zip(images, factors.tolist(), strict=True)]
    )

    off = difference(ours(images, factors), wanted)
    # a factor of 3 turns one level in the gray that is blended in into two, at the few pixels where greys differ
    assert off.max() <= (2 if ours is color.adjust_saturation else 1)
    assert (off <= 1).float().mean() > 0.999


def test_grey_is_torchvisions() -> None:
    images = random_images(20, 3, 16, 16)

    off = difference(color.rgb_to_grayscale(images), reference.rgb_to_grayscale(images, num_output_channels=3))

    assert off.max() <= 1
    assert (off == 0).float().mean() > 0.99


@pytest.mark.parametrize("channels", [1, 3])
def test_neutral_factors_change_nothing(channels: int) -> None:
    images = random_images(4, channels, 8, 8)
    ones, zeros = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)

    for adjust in (color.adjust_brightness, color.adjust_contrast, color.adjust_saturation):
        assert adjust(images, ones).equal(images)
    assert color.adjust_hue(images, zeros).equal(images)
    assert color.adjust_hue(images, zeros + 1).equal(images)


def test_a_third_of_the_circle_moves_every_channel_one_on() -> None:
    images = random_images(4, 3, 8, 8)

    assert color.adjust_hue(images, torch.full((4,), 1 / 3, dtype=torch.float64)).equal(images.roll(1, 1))
    assert color.adjust_hue(images, torch.full((4,), -1 / 3, dtype=torch.float64)).equal(images.roll(-1, 1))


def test_known_pixels() -> None:
    image = torch.tensor([200, 100, 7], dtype=torch.uint8).reshape(1, 3, 1, 1)

    def after(adjust: Callable[[Tensor, Tensor], Tensor], factor: float) -> list[int]:
        changed: list[int] = adjust(image, torch.tensor([factor], dtype=torch.float64)).flatten().tolist()
        return changed

    assert after(color.adjust_brightness, 1.3) == [255, 130, 9]
    assert after(color.adjust_contrast, 0.5) == [159, 109, 63]
    assert after(color.adjust_saturation, 0.5) == [159, 109, 63]
    assert after(color.adjust_hue, 0.1) == [184, 200, 7]
    assert color.rgb_to_grayscale(image).flatten().tolist() == [119, 119, 119]


def test_the_largest_factors_do_not_overflow() -> None:
    images = random_images(4, 3, 8, 8)

    for adjust in (color.adjust_brightness, color.adjust_contrast, color.adjust_saturation):
        changed = adjust(images, torch.full((4,), 64.0, dtype=torch.float64))
        wanted = torch.stack([getattr(reference, adjust.__name__)(image, 64.0) for image in images])
        # one level of gray counts 63 times: the bulk is at 0 or 255 and must be there
        assert ((wanted > 128) == (changed > 128)).float().mean() > 0.9


@pytest.mark.parametrize("operation", [JITTER, RandomGrayscale(name="RandomGrayscale", p=0.5)])
@pytest.mark.parametrize("shape", [(37, 3, 8, 8), (37, 1, 8, 8), (37, 3, 1, 1), (37, 3, 5, 9)])
def test_a_view_depends_on_its_sample_alone(
    operation: ColorJitter | RandomGrayscale, shape: tuple[int, int, int, int]
) -> None:
    images = random_images(*shape)
    before = images.clone()
    together = operation(images, draw(37))
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))[:11]

    assert operation(images[order], draw(37).at(order)).equal(together[order])
    assert operation(images[4:5], draw(37).at(torch.tensor([4]))).equal(together[4:5])
    assert images.equal(before)
    assert operation.output_size((5, 9)) == (5, 9)
    if shape[1:] == (3, 8, 8):
        assert not together.equal(images)
        assert not operation(images, draw(37, view=1)).equal(together)


def test_threads_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_images(64, 3, 24, 24)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = JITTER(images, draw(64))
        torch.set_num_threads(2)
        assert JITTER(images, draw(64)).equal(alone)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 5 * images[0].numel())
    assert JITTER(images, draw(64)).equal(alone)


def test_brightness_is_spread_over_its_range() -> None:
    images = torch.full((4000, 1, 1, 1), 100, dtype=torch.uint8)

    bright = ColorJitter(name="ColorJitter", brightness=0.4)(images, draw(4000)).double()
    given = ColorJitter(name="ColorJitter", brightness=(0.5, 0.7))(images, draw(4000))

    assert 59 <= bright.min() <= 60
    assert 138 <= bright.max() <= 140
    assert bright.mean() == pytest.approx(99.5, abs=1.2)
    assert given.min() == 50
    assert given.max() == 69
    wide = ColorJitter(name="ColorJitter", brightness=3.0)(images, draw(4000))
    assert wide.min() == 0
    assert (wide == 0).double().mean() < 0.01  # factors start at 0, not at -2


def test_every_order_is_drawn() -> None:
    images = random_images(2, 3, 4, 4)[1:].expand(3000, 3, 4, 4)
    fixed = ColorJitter(name="ColorJitter", brightness=(2.0, 2.0), contrast=(0.3, 0.3), saturation=(2.5, 2.5))

    results, counts = fixed(images, draw(3000)).flatten(1).unique(dim=0, return_counts=True)

    assert len(results) == 6  # the orders of three, each 500 times
    assert counts.min() > 400
    assert counts.max() < 600


def test_fraction_grayscale_is_p() -> None:
    images = random_images(1, 3, 4, 4).clone()
    images[0, 0, 0, 0], images[0, 1, 0, 0] = 250, 3
    many = images.expand(4000, 3, 4, 4)

    changed = (RandomGrayscale(name="RandomGrayscale")(many, draw(4000)) != many).flatten(1).any(1)

    assert changed.float().mean() == pytest.approx(0.1, abs=0.02)
    assert RandomGrayscale(name="RandomGrayscale", p=0.0)(many, draw(4000)).equal(many)
    assert RandomGrayscale(name="RandomGrayscale", p=1.0)(many, draw(4000)).equal(color.rgb_to_grayscale(many))


def test_defaults_are_the_identity() -> None:
    images = random_images(9, 3, 6, 6)

    assert ColorJitter(name="ColorJitter")(images, draw(9)).equal(images)


def test_an_empty_batch_stays_empty() -> None:
    assert JITTER(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), draw(0)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    "arguments",
    [{"brightness": -0.1}, {"brightness": 11.0}, {"hue": 0.6}, {"hue": [-0.6, 0.1]}, {"contrast": [1.2, 0.8]}],
)
def test_bad_amounts_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(arguments))):
        TypeAdapter(ColorJitter).validate_json(json.dumps({"name": "ColorJitter", **arguments}))


def test_a_recipe_may_write_a_pair() -> None:
    read = TypeAdapter(ColorJitter).validate_json('{"name": "ColorJitter", "hue": [-0.1, 0.2], "contrast": 1}')

    assert read.hue == (-0.1, 0.2)
    assert read.contrast == 1


def test_years_old_views_still_replay() -> None:
    images = (torch.arange(6 * 12) * 37 % 251).to(torch.uint8).reshape(6, 3, 2, 2)

    assert JITTER(images, draw(6))[:3, :, 1, 1].tolist() == [[72, 48, 152], [8, 255, 229], [244, 173, 78]]
