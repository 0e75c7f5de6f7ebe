from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.views.ops.boxes import Boxes, boxes_around, paste
from kdpipe.stages.views.ops.erase import Cutout, RandomErasing, noise
from kdpipe.stages.views.ops.rows import replace_rows
from kdpipe.stages.views.rng import CounterRNG

IDS = torch.arange(40) * 977
IMAGES = torch.randint(1, 256, (40, 3, 19, 23), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MANY = CounterRNG(seed=3, view=1, sample_ids=torch.arange(4000))
WHITE = torch.full((4000, 1, 30, 20), 255, dtype=torch.uint8)


def erasing(**arguments):
    return RandomErasing(name="RandomErasing", **arguments)


def cutout(size, **arguments):
    return Cutout(name="Cutout", size=size, **arguments)


OPERATIONS = [erasing(), erasing(value="random"), erasing(value=(1, 2, 3), p=1.0), cutout(9, fill=3)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_view_depends_on_its_sample_alone(operation, threads):
    before = torch.get_num_threads()
    whole = operation(IMAGES, CounterRNG(1, 2, IDS))
    torch.set_num_threads(threads)
    try:
        some = torch.tensor([31, 4, 4, 17])
        assert torch.equal(operation(IMAGES[some], CounterRNG(1, 2, IDS[some])), whole[some])
        alone = [operation(IMAGES[b : b + 1], CounterRNG(1, 2, IDS[b : b + 1])) for b in range(len(IDS))]
        assert torch.equal(torch.cat(alone), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_views_differ_and_inputs_are_unchanged(operation):
    images = IMAGES.clone()
    first, second = (operation(images, CounterRNG(1, view, IDS)) for view in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(images, IMAGES)
    assert first.dtype == torch.uint8


def test_never_leaves_the_images():
    assert torch.equal(erasing(p=0.0)(IMAGES, CounterRNG(1, 2, IDS)), IMAGES)


def test_erased_boxes_have_the_requested_areas_and_shapes():
    black = erasing(scale=(0.1, 0.3), ratio=(0.5, 3.0), p=1.0)(WHITE, MANY)[:, 0] == 0
    heights, widths = black.any(2).sum(1), black.any(1).sum(1)
    assert torch.equal(black.sum((1, 2)), heights * widths)  # one box each
    areas, ratios = heights * widths / 600, heights / widths
    assert 0.08 < areas.min() < 0.11
    assert 0.28 < areas.max() < 0.33
    assert areas.mean().item() == pytest.approx(0.2, abs=0.01)
    assert 0.4 < ratios.min() < 0.6
    assert 2.5 < ratios.max() < 3.5


def test_fraction_erased_is_p():
    touched = (erasing(p=0.25)(WHITE, MANY) != WHITE).flatten(1).any(1)
    assert touched.float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_boxes_not_placed_in_ten_tries_erase_nothing():
    assert torch.equal(erasing(p=1.0, scale=(1.0, 1.0))(IMAGES, CounterRNG(1, 2, IDS)), IMAGES)


def test_each_channel_has_its_level():
    view = erasing(p=1.0, value=(0, 7, 9))(IMAGES, CounterRNG(1, 2, IDS))
    changed = (view != IMAGES).any(1)
    assert changed.any()
    for channel, level in enumerate((0, 7, 9)):
        assert (view[:, channel][changed] == level).all()


def test_noise_erases_the_same_boxes_with_every_level_alike():
    plain, noisy = (erasing(p=1.0, value=value)(WHITE, MANY) for value in (0, "random"))
    inside = plain == 0
    assert (noisy[~inside] == 255).all()
    levels = noisy[inside].double()
    counts = torch.bincount(levels.long(), minlength=256)
    assert counts.max() / counts.min() < 1.2
    assert levels.mean().item() == pytest.approx(127.5, abs=0.5)
    assert levels.var().item() == pytest.approx((256**2 - 1) / 12, rel=0.01)


def test_noise_differs_between_pixels_and_samples():
    bytes_ = noise(torch.arange(500), (3, 9, 7)).double() - 127.5
    for one, other in [(bytes_[1:], bytes_[:-1]), (bytes_[..., 1:], bytes_[..., :-1]), (bytes_[:, 1:], bytes_[:, :-1])]:
        assert abs((one * other).mean().item()) / 5461 < 0.02


def test_a_value_for_each_color_is_no_good_for_gray_images():
    with pytest.raises(RecipeError, match="images of 3 channels, and these have 1"):
        erasing(p=1.0, value=(1, 2, 3))(IMAGES[:, :1], CounterRNG(1, 2, IDS))


@pytest.mark.parametrize("operation", [erasing(), erasing(value="random"), cutout(3)])
@pytest.mark.parametrize("shape", [(5, 1, 1, 1), (5, 3, 1, 1), (5, 1, 2, 9), (0, 3, 4, 4)])
def test_small_images(operation, shape):
    images = torch.full(shape, 9, dtype=torch.uint8)
    assert operation(images, CounterRNG(0, 0, torch.arange(shape[0]))).shape == shape


def test_a_square_is_cut_out_about_every_pixel():
    size = 6
    black = cutout(size)(WHITE, MANY)[:, 0] == 0
    heights, widths = black.any(2).sum(1), black.any(1).sum(1)
    assert torch.equal(black.sum((1, 2)), heights * widths)
    assert heights.max() == widths.max() == size
    assert heights.min() == widths.min() == size // 2
    inner = (heights == size) & (widths == size)
    assert inner.float().mean().item() == pytest.approx(25 / 30 * 15 / 20, abs=0.03)
    assert black.any(0).all()


def test_odd_squares_keep_their_size():
    black = cutout(5)(WHITE, MANY)[:, 0] == 0
    assert black.sum((1, 2)).max() == 25


def test_a_square_that_could_cover_everything_is_refused():
    assert cutout(22).output_size((19, 23)) == (19, 23)
    with pytest.raises(RecipeError, match=r"size = 23 could cover all of an image of 19 x 23: keep it below 23"):
        cutout(23).output_size((19, 23))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 20), st.integers(0, 20), st.data())
def test_boxes_are_cut_off_at_the_border(height, width, box_height, box_width, data):
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    numbers = (torch.tensor([number]) for number in (row, column, box_height, box_width))
    boxes = boxes_around(*numbers, (height, width))
    inside = paste(torch.zeros(1, 1, height, width, dtype=torch.uint8), torch.tensor(1, dtype=torch.uint8), boxes)
    for y in range(height):
        for x in range(width):
            down, right = y - (row - box_height // 2), x - (column - box_width // 2)
            assert inside[0, 0, y, x] == (0 <= down < box_height and 0 <= right < box_width)


def test_pasting_shows_the_other_picture_inside_the_box():
    boxes = Boxes(*(torch.full((40,), side) for side in (2, 5, 9, 4)))
    others = IMAGES.flip(0)
    expected = IMAGES.clone()
    expected[:, :, 2:11, 5:9] = others[:, :, 2:11, 5:9]
    assert torch.equal(paste(IMAGES, others, boxes), expected)


def test_rows_are_replaced():
    rows = torch.tensor([7, 3])
    expected = IMAGES.clone()
    expected[rows] = IMAGES[:2]
    assert torch.equal(replace_rows(IMAGES, rows, IMAGES[:2]), expected)


@pytest.mark.parametrize("value", [256, (1, 2), (1, 2, -1), "noise", 0.5])
def test_a_value_out_of_range_is_refused(value):
    with pytest.raises(RecipeError, match=r"expected a level from 0 to 255, \[red, green"):
        erasing(value=value)


@pytest.mark.parametrize("wrong", [{"p": 1.1}, {"scale": (0.3, 0.1)}, {"ratio": (0.0, 1.0)}])
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(RecipeError):
        erasing(**wrong)


def test_a_recipe_may_give_three_levels():
    parsed = TypeAdapter(RandomErasing).validate_json('{"name": "RandomErasing", "value": [1, 2, 3]}')
    assert parsed == erasing(value=(1, 2, 3))


def test_known_pixels_stay_known():
    """Stores of years ago hold what the teacher said about exactly these pixels."""
    pattern = (torch.arange(2 * 16) * 7 % 256).to(torch.uint8).reshape(2, 1, 4, 4)
    draw = CounterRNG(9, 2, torch.tensor([17, 2**62]))
    assert erasing(p=1.0, value="random")(pattern, draw)[:, 0].tolist() == KNOWN_ERASED
    assert cutout(2, fill=255)(pattern, draw)[:, 0].tolist() == KNOWN_CUT


KNOWN_ERASED = [
    [[0, 7, 14, 21], [28, 35, 42, 49], [56, 63, 201, 77], [84, 91, 98, 105]],
    [[112, 119, 126, 19], [140, 147, 154, 239], [168, 175, 182, 128], [196, 203, 210, 217]],
]
KNOWN_CUT = [
    [[0, 7, 14, 21], [28, 255, 255, 49], [56, 255, 255, 77], [84, 91, 98, 105]],
    [[112, 119, 255, 255], [140, 147, 154, 161], [168, 175, 182, 189], [196, 203, 210, 217]],
]
