from __future__ import annotations

import itertools
import multiprocessing
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.global_rng import preserve_rng_state, seed_global_rngs
from kdpipe.stages.views.torchvision_pipeline import build_transform
from kdpipe.stages.views.transforms_engine import apply_transform, check_deterministic, transform_identity

RGB = np.random.default_rng(0).integers(0, 256, (3, 24, 20), dtype=np.uint8)
GRAY = RGB[:1]

USUAL = build_transform(
    [
        {"name": "RandomResizedCrop", "size": 16, "scale": [0.2, 1.0], "interpolation": "bicubic"},
        {"name": "RandomHorizontalFlip"},
        {"name": "RandAugment", "num_ops": 2, "magnitude": 9},
        {"name": "ColorJitter", "brightness": 0.4, "hue": 0.1},
        {"name": "ToImage"},
        {"name": "RandomErasing", "p": 0.5},
    ]
)


def by_torch(image: Any) -> Any:
    mask = int(torch.randint(256, ()))
    return image.point(lambda level: level ^ mask)


def by_numpy(image: Any) -> Any:
    array = np.asarray(image)
    return np.clip(array + np.random.normal(0, 20, array.shape), 0, 255).astype(np.uint8)


def by_random(image: Any) -> Any:
    offset = random.randrange(256)
    return image.point(lambda level: (level + offset) % 256)


def states() -> tuple[Any, ...]:
    name, words, *rest = np.random.get_state()
    return (random.getstate(), torch.default_generator.get_state().tolist(), name, words.tolist(), *rest)


KNOWN = (1184736678, 87505313, 1485782660)

KNOWN_PIXELS = [[9, 10, 13, 14], [9, 8, 13, 12], [10, 9, 14, 13], [6, 7, 10, 11]]


def refuses(text: str) -> Any:
    return pytest.raises(RecipeError, match=re.escape(text))


@pytest.mark.parametrize("transform", [USUAL, by_torch, by_numpy, by_random])
@settings(max_examples=15, deadline=None)
@given(asks=st.lists(st.tuples(st.integers(0, 5), st.integers(-2, 2), st.integers(0, 1)), min_size=1, max_size=8))
def test_a_view_depends_on_seed_sample_and_view_alone(
    transform: Callable[[Any], Any], asks: list[tuple[int, int, int]]
) -> None:
    for ask in asks:  # in any order, some of them twice, after others
        alone = apply_transform(transform, RGB, *ask)
        random.seed(9)
        np.random.seed(9)
        torch.default_generator.manual_seed(9)
        assert torch.equal(apply_transform(transform, RGB, *ask), alone)


@pytest.mark.parametrize("transform", [USUAL, by_torch, by_numpy, by_random])
def test_seeds_samples_and_views_give_different_images(transform: Callable[[Any], Any]) -> None:
    asks = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (2**62, 0, 0), (-1, 0, 0), (0, -1, 0)]
    assert len({apply_transform(transform, RGB, *ask).numpy().tobytes() for ask in asks}) == len(asks)


def test_child_process_renders_the_same_images() -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        reference_result = pool.apply(_digests)
    assert reference_result == _digests()


def _digests() -> list[bytes]:
    transforms = (USUAL, by_torch, by_numpy, by_random)
    return [apply_transform(one, RGB, number, 3, 7).numpy().tobytes() for one in transforms for number in range(4)]


def test_known_random_numbers() -> None:
    """Never change: stores of years ago must replay."""
    with preserve_rng_state():
        seed_global_rngs(7, sample_id=123, view=2)
        drawn = (int(torch.randint(2**31, ())), int(np.random.randint(2**31)), random.getrandbits(31))
    assert drawn == KNOWN


def test_known_pixels() -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)
    transform = build_transform([{"name": "RandomCrop", "size": 2}, {"name": "RandomHorizontalFlip"}])
    assert [apply_transform(transform, pixels, at, 0, 0).flatten().tolist() for at in range(4)] == KNOWN_PIXELS


def test_samples_share_out_the_chances() -> None:
    flip = build_transform([{"name": "RandomHorizontalFlip", "p": 0.25}])
    pixels = np.array([[[0, 1]]], dtype=np.uint8)
    flipped = sum(int(apply_transform(flip, pixels, sample, 0, 0)[0, 0, 0]) for sample in range(2000))
    assert abs(flipped - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("transform", [USUAL, by_torch, by_numpy, by_random])
def test_the_global_generators_are_left_as_they_were(transform: Callable[[Any], Any]) -> None:
    np.random.normal()  # numpy now holds the second of a pair
    before = states()
    apply_transform(transform, RGB, 1, 2, 3)
    check_deterministic(transform, RGB)
    assert states() == before


def test_failing_transform_restores_global_rng_state() -> None:
    def fails(image: Any) -> Any:
        by_torch(by_random(image))
        np.random.rand()
        np.random.set_bit_generator(np.random.PCG64())
        raise ValueError("no")

    before, words = states(), np.random.get_bit_generator()
    with refuses("sample 12 (ValueError: no)"):
        apply_transform(fails, RGB, 12, 0, 0)
    assert states() == before
    assert np.random.get_bit_generator() is words


def test_swapped_generator_does_not_affect_the_next_sample() -> None:
    def swaps(image: Any) -> Any:
        drawn = by_numpy(image)
        np.random.set_bit_generator(np.random.PCG64())
        return drawn

    with preserve_rng_state():
        assert torch.equal(apply_transform(swaps, RGB, 1, 0, 0), apply_transform(swaps, RGB, 1, 0, 0))


def test_a_row_of_samples_within_one_block_is_the_same() -> None:
    alone = [apply_transform(USUAL, RGB, number, 0, 0) for number in range(4)]
    before = states()
    with preserve_rng_state():
        row = [apply_transform(USUAL, RGB, number, 0, 0) for number in range(4)]
    assert states() == before
    assert all(torch.equal(one, other) for one, other in zip(alone, row, strict=True))


@pytest.mark.parametrize("pixels", [RGB, GRAY, RGB[:, :1, :1], np.ascontiguousarray(RGB[::-1, ::2])[:, :, ::3]])
def test_pixels_come_through_untouched(pixels: Any) -> None:
    before = pixels.copy()
    for transform in (
        v2.Identity(),
        v2.ToImage(),
        v2.PILToTensor(),
        np.asarray,
        v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
        v2.Compose([v2.ToImage(), v2.ToDtype(torch.float64, scale=True)]),
    ):
        view = apply_transform(transform, pixels, 0, 0, 0)
        assert type(view) is torch.Tensor
        assert view.dtype == torch.uint8
        assert view.is_contiguous()
        assert np.array_equal(view.numpy(), before)
    assert np.array_equal(pixels, before)


def test_view_is_a_plain_tensor_with_torchvision_return_types() -> None:
    with tv_tensors.set_return_type("TVTensor"):
        assert type(apply_transform(v2.ToImage(), RGB, 0, 0, 0)) is torch.Tensor


def test_transform_gets_a_copy_of_the_image() -> None:
    modes = []

    def paints(image: Image.Image) -> Image.Image:
        modes.append(image.mode)
        image.paste(image.getpixel((0, 0)), (0, 0, *image.size))
        return image

    for pixels in (RGB, GRAY):
        before = pixels.copy()
        assert len(apply_transform(paints, pixels, 0, 0, 0).unique()) <= len(pixels)
        assert np.array_equal(pixels, before)
    assert modes == ["RGB", "L"]


@pytest.mark.filterwarnings("error")
def test_floats_are_rounded_half_up() -> None:
    levels = torch.tensor([0.0, 0.49 / 255, 0.5 / 255, 1.5 / 255, 254.49 / 255, 254.5 / 255, 1.0], dtype=torch.float64)
    made = apply_transform(lambda image: levels.view(1, 1, -1).requires_grad_(), GRAY, 0, 0, 0)
    assert made.flatten().tolist() == [0, 0, 1, 2, 254, 255, 255]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (Image.new("L", (4, 4)), "an image of mode 'L', expected 'RGB'"),
        (Image.new("RGBA", (4, 4)), "an image of mode 'RGBA', expected 'RGB'"),
        (torch.zeros(1, 4, 4, dtype=torch.uint8), "return [1, 4, 4], expected [3, height, width]"),
        (torch.zeros(4, 4, dtype=torch.uint8), "return [4, 4], expected [3, height, width]"),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), "return [3, 0, 4], expected [3, height, width]"),
        (tv_tensors.Image(torch.zeros(1, 3, 4, 4)), "return [1, 3, 4, 4], expected [3, height, width]"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "a tensor of torch.int64, expected uint8"),
        (torch.full((3, 4, 4), -2.0), "from -2 to -2, expected uint8, or floats in [0, 1]"),
        (
            torch.full((3, 4, 4), 1.01),
            "leave Normalize to teacher.mean/std and student.mean/std: views are not normalized",
        ),
        (torch.full((3, 4, 4), float("nan")), "from nan to nan"),
        (np.zeros((4, 4, 3)), "a numpy array of float64 [4, 4, 3], expected uint8 [height, width, channels]"),
        (np.zeros((2, 4, 4, 3), np.uint8), "a numpy array of uint8 [2, 4, 4, 3]"),
        (np.zeros((3, 4, 5), np.uint8), "return [5, 3, 4], expected [3, height, width]"),
        ((RGB, 1), "a tuple of 2 items, expected a PIL image"),
        ({"image": RGB}, "something of type dict"),
        (None, "something of type NoneType"),
    ],
)
def test_invalid_transform_results_are_rejected(returned: Any, message: str) -> None:
    with refuses(message) as raised:
        apply_transform(lambda image: returned, RGB, 41, 0, 0)
    assert "for sample 41" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_normalize_is_refused() -> None:
    pipeline = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    with refuses("leave Normalize to teacher.mean/std and student.mean/std"):
        apply_transform(pipeline, RGB, 0, 0, 0)


def test_a_failing_transform_names_the_sample() -> None:
    with refuses("the transforms failed on sample 77 (ValueError: Required crop size"):
        apply_transform(v2.RandomCrop(64), RGB, 77, 0, 0)


def _own_numpy(image: Any) -> Any:
    return np.asarray(image)[:, ::-1] if np.random.default_rng().random() < 0.5 else image


def _own_torch() -> Callable[[Any], Any]:
    own = torch.Generator()
    return lambda image: v2.functional.horizontal_flip(image) if torch.rand((), generator=own) < 0.5 else image


def _remembers() -> Callable[[Any], Any]:
    seen: list[Any] = [None]

    def swap(image: Any) -> Any:
        last, seen[0] = seen[0] or image, by_random(image)
        return last

    return swap


def _takes_turns() -> Callable[[Any], Any]:
    turn = itertools.cycle([0, 128])

    def lighten(image: Any) -> Any:
        mask = next(turn)
        return image.point(lambda level: level ^ mask)

    return lighten


@pytest.mark.parametrize("transform", [_own_numpy, _own_torch(), _remembers(), _takes_turns()])
def test_private_random_generators_are_rejected(transform: Callable[[Any], Any]) -> None:
    with refuses("the transforms are not deterministic"):
        check_deterministic(transform, RGB)


@pytest.mark.parametrize("transform", [USUAL, by_torch, by_numpy, by_random])
def test_draws_from_global_generators_are_reproducible(transform: Callable[[Any], Any]) -> None:
    check_deterministic(transform, RGB)


def test_operations_describe_themselves_as_they_were_written() -> None:
    tables = ({"name": "RandomCrop", "size": [8, 8]},)
    assert transform_identity(Views(engine="transforms", operations=tables)) == {
        "engine": "transforms",
        "engine_version": 1,
        "operations": [{"name": "RandomCrop", "size": [8, 8]}],
    }


def test_output_of_a_transform_goes_to_stderr(capsys):
    def chatty(image):
        print("looking at", image.size)
        return image

    apply_transform(chatty, np.zeros((3, 4, 5), np.uint8), 0, 0, 0)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "looking at (5, 4)" in printed.err


def test_system_exit_in_a_transform_is_an_error():
    def leaver(image):
        raise SystemExit(5)

    with pytest.raises(RecipeError, match="the transforms failed on sample 7"):
        apply_transform(leaver, np.zeros((3, 4, 5), np.uint8), 7, 0, 0)
