"""RandAugment and TrivialAugmentWide: torchvision's operations at torchvision's magnitudes, drawn evenly."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision.transforms.v2 as reference
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from kdpipe.stages.views.ops import rand_augment, rows
from kdpipe.stages.views.ops.rand_augment import RandAugment, TrivialAugmentWide
from kdpipe.stages.views.rng import CounterRNG

RAND, TRIVIAL = RandAugment(name="RandAugment"), TrivialAugmentWide(name="TrivialAugmentWide")
NAMES = list(reference.RandAugment._AUGMENTATION_SPACE)


def random_images(batch: int, channels: int, height: int, width: int) -> Tensor:
    noise = torch.randint(0, 256, (batch, channels, height, width), generator=torch.Generator().manual_seed(3))
    return noise.to(torch.uint8)


def draw(batch: int, view: int = 0) -> CounterRNG:
    return CounterRNG(seed=5, view=view, sample_ids=torch.arange(batch))


@dataclass(frozen=True)
class Chosen(CounterRNG):
    """The same operation, sign and bin for every sample."""

    operation: int = 0
    negative: bool = False
    bin: int = 0

    def integers(self, bound: int, parameter: int) -> Tensor:
        return torch.full((len(self.sample_ids),), self.operation if parameter == 0 else self.bin)

    def bernoulli(self, probability: float, parameter: int) -> Tensor:
        return torch.full((len(self.sample_ids),), self.negative)


def reference_result(transform: Any, images: Tensor, name: str, at: int, num_bins: int, negative: bool) -> Tensor:
    """What torchvision makes of it, by its own table of magnitudes."""
    magnitudes, signed = transform._AUGMENTATION_SPACE[name]
    of_bins = magnitudes(num_bins, *images.shape[2:])
    magnitude = 0.0 if of_bins is None else float(of_bins[at]) * (-1 if signed and negative else 1)
    changed: Tensor = transform._apply_image_or_video_transform(images, name, magnitude, "nearest", {"others": 7})
    return changed


@pytest.mark.parametrize("size", [(32, 32), (23, 40)])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_each_operation_is_torchvisions(name: str, negative: bool, size: tuple[int, int]) -> None:
    images = random_images(4, 3, *size)
    for at in (0, 4, 9, 17, 30):
        same = Chosen(0, 0, torch.arange(4), operation=NAMES.index(name), negative=negative, bin=at)
        rand = RandAugment(name="RandAugment", num_ops=1, magnitude=at, fill=7)
        trivial = TrivialAugmentWide(name="TrivialAugmentWide", fill=7)
        for ours, transform in [(rand, reference.RandAugment()), (trivial, reference.TrivialAugmentWide())]:
            changed = ours(images, same)
            off = (changed.int() - reference_result(transform, images, name, at, 31, negative).int()).abs()
            # a slope of 0.04 puts whole rows halfway between two pixels, where torchvision goes by rounding errors
            assert (off <= 1).double().mean() >= (0.95 if name in ("ShearX", "ShearY") else 0.999), at


def test_the_space_is_torchvisions() -> None:
    assert list(rand_augment._OPERATIONS) == NAMES == list(reference.TrivialAugmentWide._AUGMENTATION_SPACE)
    assert {name for name, (_, signed) in reference.RandAugment._AUGMENTATION_SPACE.items() if signed} == (
        rand_augment._SIGNED
    )


@pytest.mark.parametrize("operation", [RAND, TRIVIAL])
@pytest.mark.parametrize("shape", [(60, 3, 8, 8), (60, 1, 8, 8), (60, 3, 1, 1), (60, 3, 5, 9)])
def test_a_view_depends_on_its_sample_alone(
    operation: RandAugment | TrivialAugmentWide, shape: tuple[int, int, int, int]
) -> None:
    images = random_images(*shape)
    before = images.clone()
    together = operation(images, draw(60))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:31]

    assert operation(images[order], draw(60).at(order)).equal(together[order])
    for row in range(8):
        assert operation(images[row : row + 1], draw(60).at(torch.tensor([row]))).equal(together[row : row + 1])
    assert images.equal(before)
    assert operation.output_size((5, 9)) == (5, 9)
    if shape[2] > 1:
        assert not operation(images, draw(60, view=1)).equal(together)


@pytest.mark.parametrize("operation", [RAND, TRIVIAL])
def test_threads_and_blocks_change_nothing(
    operation: RandAugment | TrivialAugmentWide, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = random_images(64, 3, 24, 24)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = operation(images, draw(64))
        torch.set_num_threads(2)
        assert operation(images, draw(64)).equal(alone)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 2 * images[0].numel())
    assert operation(images, draw(64)).equal(alone)


def test_operations_signs_and_steps_are_drawn_evenly() -> None:
    images = torch.zeros(14_000, 1, 1, 9, dtype=torch.uint8)
    images[:, :, :, 4] = 200
    moves = RandAugment(name="RandAugment", num_ops=1, magnitude=30)(images, draw(14_000))

    # 150 / 331 * 9 is 4 pixels: only TranslateX brings the bright pixel to an end, at either end as often
    left, right = (int((moves[:, 0, 0, at] == 200).sum()) for at in (0, 8))
    assert left == pytest.approx(500, abs=80)
    assert right == pytest.approx(500, abs=80)

    twice = RandAugment(name="RandAugment", num_ops=2, magnitude=30)(images, draw(14_000))
    unmoved = float((moves == images).flatten(1).all(1).double().mean())
    assert (twice == images).flatten(1).all(1).double().mean() == pytest.approx(unmoved**2, abs=0.05)


def test_trivial_augment_draws_every_strength() -> None:
    images = torch.zeros(30_000, 1, 1, 65, dtype=torch.uint8)
    images[:, :, :, 32] = 200

    moved = TRIVIAL(images, draw(30_000))

    places = (moved[:, 0, 0] == 200).nonzero()[:, 1]
    for place in (0, 64, 32 + 17, 32 - 17):  # 32 pixels, and 17 of 32 * 16 / 30
        assert int((places == place).sum()) == pytest.approx(30_000 / 14 / 31 / 2, abs=22)


def test_no_operations_is_the_identity() -> None:
    images = random_images(9, 3, 6, 6)

    assert RandAugment(name="RandAugment", num_ops=0)(images, draw(9)).equal(images)
    assert RAND(images[:0], draw(0)).shape == (0, 3, 6, 6)


@pytest.mark.parametrize(
    "arguments", [{"magnitude": 31}, {"magnitude": -1}, {"num_ops": -1}, {"interpolation": "bilinear"}, {"fill": 256}]
)
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(arguments))):
        TypeAdapter(RandAugment).validate_json(json.dumps({"name": "RandAugment", **arguments}))


@pytest.mark.parametrize(("operation", "wanted"), [(RAND, "500e1422058b3823"), (TRIVIAL, "37a0e7f096f496cd")])
def test_years_old_views_still_replay(operation: RandAugment | TrivialAugmentWide, wanted: str) -> None:
    images = (torch.arange(200 * 3 * 8 * 8) * 37 % 251).to(torch.uint8).reshape(200, 3, 8, 8)

    assert hashlib.sha256(operation(images, draw(200)).numpy().tobytes()).hexdigest()[:16] == wanted
