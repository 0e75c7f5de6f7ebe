"""StoreLayout: torchvision's conventions of center and sign, pixel by pixel, and the ranges a recipe asks for."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from kdpipe.stages.views.ops import affine as geometry
from kdpipe.stages.views.ops import rows
from kdpipe.stages.views.ops.affine import RandomAffine, affine, inverse_matrices
from kdpipe.stages.views.rng import CounterRNG

EVERYTHING = RandomAffine(
    name="RandomAffine", degrees=30.0, translate=(0.2, 0.1), scale=(0.7, 1.4), shear=(-10.0, 10.0, -5.0, 5.0), fill=9
)
SHAPES = [(16, 3, 32, 32), (16, 1, 21, 34), (16, 3, 45, 20), (16, 3, 1, 1)]


def random_images(batch: int, channels: int, height: int, width: int) -> Tensor:
    noise = torch.randint(0, 256, (batch, channels, height, width), generator=torch.Generator().manual_seed(3))
    return noise.to(torch.uint8)


def draw(batch: int, view: int = 0) -> CounterRNG:
    return CounterRNG(seed=5, view=view, sample_ids=torch.arange(batch))


def spread(low: float, high: float) -> Tensor:
    """16 numbers that are no round ones: where pixels are exactly halfway between two, torchvision may differ."""
    return torch.linspace(low, high, 16, dtype=torch.float64) + math.pi / 1000


def share_equal(ours: Tensor, reference_result: Tensor) -> float:
    return float((ours == reference_result).double().mean())


@pytest.mark.parametrize("center", [None, (3.0, 5.5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_affine_is_torchvisions(shape: tuple[int, int, int, int], center: tuple[float, float] | None) -> None:
    images, angles, scales = random_images(*shape), spread(-180, 180), spread(0.5, 2)
    moves = torch.stack([spread(-9, 9).round(), spread(5, -5).round()], 1)
    shears = torch.stack([spread(-30, 40), spread(20, -10)], 1)
    height, width = shape[2:]
    from_middle = (center[0] - width / 2, center[1] - height / 2) if center else (0.0, 0.0)

    matrices = inverse_matrices(angle=angles, translate=moves, scale=scales, shear=shears, center=from_middle)
    wanted = [
        reference.affine(
            image,
            float(angles[b]),
            moves[b].tolist(),
            float(scales[b]),
            shears[b].tolist(),
            fill=9,
            center=list(center) if center else None,
        )
        for b, image in enumerate(images)
    ]

    assert share_equal(affine(images, matrices, fill=9), torch.stack(wanted)) >= 0.999


@pytest.mark.parametrize("shape", SHAPES)
def test_geometry_matches_torchvision_rand_augment(shape: tuple[int, int, int, int]) -> None:
    images, slopes, pixels, degrees = random_images(*shape), spread(-0.9, 0.9), spread(-9, 9).round(), spread(-130, 130)

    def reference_result(center: list[float] | None, moves: list[list[float]], shears: list[list[float]]) -> Tensor:
        asked = zip(images, moves, shears, strict=True)
        return torch.stack([reference.affine(i, 0.0, m, 1.0, s, fill=7, center=center) for i, m, s in asked])

    still, corner = [[0.0, 0.0]] * 16, [0.0, 0.0]
    angles = [math.degrees(math.atan(slope)) for slope in slopes.tolist()]
    turned = [reference.rotate(i, d, fill=7) for i, d in zip(images, degrees.tolist(), strict=True)]
    for ours, wanted in [
        (geometry.shear_x(images, slopes, 7), reference_result(corner, still, [[angle, 0.0] for angle in angles])),
        (geometry.shear_y(images, slopes, 7), reference_result(corner, still, [[0.0, angle] for angle in angles])),
        (geometry.translate_x(images, pixels, 7), reference_result(None, [[p, 0.0] for p in pixels.tolist()], still)),
        (geometry.translate_y(images, pixels, 7), reference_result(None, [[0.0, p] for p in pixels.tolist()], still)),
        (geometry.rotate(images, degrees, 7), torch.stack(turned)),
    ]:
        assert share_equal(ours, wanted) >= 0.999


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(-50, 50), st.integers(-50, 50))
def test_whole_pixels_move_exactly(height: int, width: int, right: int, down: int) -> None:
    image = random_images(1, 3, height, width)
    moves = torch.tensor([[right, down]], dtype=torch.float64)

    moved = affine(image, inverse_matrices(angle=torch.zeros(1, dtype=torch.float64), translate=moves), fill=9)

    wide = torch.nn.functional.pad(image, [50, 50, 50, 50], value=9)
    assert moved.equal(wide[:, :, 50 - down : 50 - down + height, 50 - right : 50 - right + width])


def test_quarter_turns_are_exact() -> None:
    images = random_images(5, 3, 13, 13)
    angles = torch.tensor([0.0, 90.0, 180.0, 270.0, -90.0], dtype=torch.float64)

    turned = geometry.rotate(images, angles, fill=9)

    assert turned.equal(torch.stack([image.rot90(k, (1, 2)) for k, image in zip((0, 1, 2, 3, 3), images, strict=True)]))


def test_known_pixels() -> None:
    image = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
    one = torch.ones(1, dtype=torch.float64)

    assert geometry.rotate(image, 30 * one, 99)[0, 0].tolist() == [
        [99, 2, 3, 99],
        [0, 5, 6, 11],
        [4, 9, 10, 15],
        [99, 12, 13, 99],
    ]
    assert geometry.shear_x(image, 0.3 * one, 99)[0, 0].tolist() == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [9, 10, 11, 99],
        [13, 14, 15, 99],
    ]
    double = inverse_matrices(angle=0 * one, scale=2 * one)
    assert affine(image, double)[0, 0].tolist() == [[5, 5, 6, 6], [5, 5, 6, 6], [9, 9, 10, 10], [9, 9, 10, 10]]


def test_a_corner_far_outside_is_filled() -> None:
    image = random_images(1, 1, 4, 4)
    far = inverse_matrices(
        angle=torch.zeros(1, dtype=torch.float64), translate=torch.full((1, 2), 1e9, dtype=torch.float64)
    )

    assert (affine(image, far, fill=77) == 77).all()


@pytest.mark.parametrize("shape", [(37, 3, 8, 8), (37, 1, 8, 8), (37, 3, 1, 1), (37, 3, 5, 9)])
def test_a_view_depends_on_its_sample_alone(shape: tuple[int, int, int, int]) -> None:
    images = random_images(*shape)
    before = images.clone()
    together = EVERYTHING(images, draw(37))
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))[:11]

    assert EVERYTHING(images[order], draw(37).at(order)).equal(together[order])
    assert EVERYTHING(images[4:5], draw(37).at(torch.tensor([4]))).equal(together[4:5])
    assert images.equal(before)
    assert EVERYTHING.output_size((5, 9)) == (5, 9)
    if shape[2] > 1:
        assert not EVERYTHING(images, draw(37, view=1)).equal(together)


def test_threads_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_images(64, 3, 24, 24)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = EVERYTHING(images, draw(64))
        torch.set_num_threads(2)
        assert EVERYTHING(images, draw(64)).equal(alone)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 5 * images[0].numel())
    assert EVERYTHING(images, draw(64)).equal(alone)


def test_translations_are_integers_over_the_whole_range() -> None:
    images = torch.zeros(3000, 1, 9, 21, dtype=torch.uint8)
    images[:, :, 4, 10] = 255

    moved = RandomAffine(name="RandomAffine", degrees=0.0, translate=(0.2, 0.4))(images, draw(3000))

    rows, columns = (moved == 255).nonzero()[:, 2:].unbind(1)
    assert len(rows) == 3000
    assert rows.unique().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]  # 0.4 * 9 = 3.6, rounded to 4
    assert columns.unique().tolist() == [6, 7, 8, 9, 10, 11, 12, 13, 14]  # 0.2 * 21 = 4.2
    assert rows.double().mean() == pytest.approx(4, abs=0.15)
    assert columns.double().mean() == pytest.approx(10, abs=0.15)


def test_parameters_fill_their_ranges() -> None:
    operation = RandomAffine(
        name="RandomAffine", degrees=(10.0, 50.0), scale=(0.5, 0.8), shear=(0.0, 0.0, 0.0, 0.0), center=(4.0, 4.0)
    )

    matrices = operation._matrices(draw(4000), (8, 8))

    scales = matrices[:, :, :2].det().rsqrt()
    angles = torch.rad2deg(torch.atan2(matrices[:, 0, 1], matrices[:, 0, 0]))
    assert 10 <= angles.min() < 10.2
    assert 49.8 < angles.max() < 50
    assert angles.mean() == pytest.approx(30, abs=0.8)
    assert 0.5 <= scales.min() < 0.502
    assert 0.798 < scales.max() < 0.8
    assert abs(float(torch.corrcoef(torch.stack([angles, scales]))[0, 1])) < 0.05
    assert matrices[:, :, 2].abs().max() < 1e-12


def test_defaults_are_the_identity() -> None:
    images = random_images(9, 3, 6, 7)

    assert RandomAffine(name="RandomAffine", degrees=0.0, fill=9)(images, draw(9)).equal(images)
    assert EVERYTHING(images[:0], draw(0)).shape == (0, 3, 6, 7)


@pytest.mark.parametrize(
    "arguments",
    [
        {"degrees": -1.0},
        {"degrees": [20.0, 10.0]},
        {"scale": [0.0, 1.0]},
        {"translate": [0.1, 1.1]},
        {"shear": [0.0, 1.0, 5.0, 2.0]},
        {"interpolation": "bilinear"},
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(arguments))):
        TypeAdapter(RandomAffine).validate_json(json.dumps({"name": "RandomAffine", "degrees": 1.0, **arguments}))


def test_years_old_views_still_replay() -> None:
    images = (torch.arange(6 * 16) * 37 % 251).to(torch.uint8).reshape(6, 1, 4, 4)

    assert EVERYTHING(images, draw(6))[:2, 0].tolist() == [
        [[37, 74, 74, 111], [148, 185, 222, 8], [45, 82, 119, 156], [193, 230, 230, 16]],
        [[90, 127, 127, 61], [238, 238, 24, 61], [135, 135, 172, 209], [135, 135, 172, 106]],
    ]
