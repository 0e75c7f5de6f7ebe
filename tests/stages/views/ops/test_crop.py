from __future__ import annotations

import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torchvision.transforms import v2

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.views.ops.boxes import Boxes, random_boxes
from kdpipe.stages.views.ops.crop import RandomResizedCrop
from kdpipe.stages.views.ops.resample import resample
from kdpipe.stages.views.rng import CounterRNG

IDS = torch.arange(40) * 977
IMAGES = torch.randint(0, 256, (40, 3, 19, 23), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MANY = CounterRNG(seed=3, view=1, sample_ids=torch.arange(50_000))


def crop(**arguments):
    return RandomResizedCrop(name="RandomResizedCrop", **arguments)


def boxes_of(*box, batch):
    return Boxes(*(torch.full((batch,), side) for side in box))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [None, 32, (17, 40)])
def test_a_view_depends_on_its_sample_alone(size, threads):
    before = torch.get_num_threads()
    whole = crop(size=size)(IMAGES, CounterRNG(1, 2, IDS))
    torch.set_num_threads(threads)
    try:
        some = torch.tensor([31, 4, 4, 17])
        assert torch.equal(crop(size=size)(IMAGES[some], CounterRNG(1, 2, IDS[some])), whole[some])
        assert torch.equal(crop(size=size)(IMAGES[39:], CounterRNG(1, 2, IDS[39:])), whole[39:])
    finally:
        torch.set_num_threads(before)


def test_batches_larger_than_a_slice_give_the_same_images():
    images = torch.randint(0, 256, (5, 3, 200, 230), dtype=torch.uint8)
    whole = crop()(images, CounterRNG(1, 2, IDS[:5]))
    assert all(torch.equal(crop()(images[b : b + 1], CounterRNG(1, 2, IDS[b : b + 1]))[0], whole[b]) for b in range(5))


def test_crops_differ_and_inputs_are_unchanged():
    images = IMAGES.clone()
    first, second = (crop()(images, CounterRNG(1, view, IDS)) for view in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(images, IMAGES)


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.integers(0, 2**32),
    st.data(),
)
def test_resampling_is_torchs_bilinear_within_a_grey_level(size, out, seed, data):
    images = torch.randint(0, 256, (2, 1, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    height, width = data.draw(st.integers(1, size[0])), data.draw(st.integers(1, size[1]))
    top, left = data.draw(st.integers(0, size[0] - height)), data.draw(st.integers(0, size[1] - width))
    ours = resample(images, boxes_of(top, left, height, width, batch=2), out)
    box = images[:, :, top : top + height, left : left + width].double()
    reference_result = F.interpolate(box, size=out, mode="bilinear", align_corners=False, antialias=False)
    assert ours.shape == reference_result.shape
    assert (
        (ours.double() - reference_result).abs() <= 0.75
    ).all()  # half a level of rounding, and what weights of 11 bits cost


def test_boxes_of_output_size_are_copied():
    assert torch.equal(resample(IMAGES, boxes_of(0, 0, 19, 23, batch=40), (19, 23)), IMAGES)
    part = IMAGES[:, :, 2:11, 5:9]
    assert torch.equal(resample(IMAGES, boxes_of(2, 5, 9, 4, batch=40), (9, 4)), part)


def test_half_a_level_is_rounded_up():
    images = torch.tensor([[[[10, 11]]]], dtype=torch.uint8)
    assert resample(images, boxes_of(0, 0, 1, 2, batch=1), (1, 1)).item() == 11  # 10.5


@pytest.mark.parametrize("level", [0, 1, 254, 255])
def test_constant_images_stay_constant(level):
    images = torch.full((40, 1, 19, 23), level, dtype=torch.uint8)
    assert (crop(size=31)(images, CounterRNG(0, 0, IDS)) == level).all()


def test_boxes_have_the_requested_areas_and_shapes():
    boxes = random_boxes(MANY, (400, 300), (400, 300), (0.1, 0.4), (0.5, 2.0))
    areas, ratios = (boxes.heights * boxes.widths) / 120_000, boxes.widths / boxes.heights
    assert (boxes.heights > 0).all()
    assert 0.098 < areas.min() < 0.101
    assert 0.399 < areas.max() < 0.402
    assert areas.mean().item() == pytest.approx(0.25, abs=0.003)
    assert areas.var().item() == pytest.approx(0.3**2 / 12, rel=0.05)
    assert 0.49 < ratios.min() < 0.51
    assert 1.96 < ratios.max() < 2.03
    assert ratios.log().mean().item() == pytest.approx(0, abs=0.01)
    assert ratios.log().var().item() == pytest.approx(math.log(4) ** 2 / 12, rel=0.05)


def test_boxes_are_distributed_as_torchvisions():
    """With the retries that images this wide need: areas and heights have the same quantiles."""
    torch.manual_seed(0)
    reference_result = v2.RandomResizedCrop(8)
    params = [reference_result.make_params([torch.empty(1, 50, 90)]) for _ in range(4000)]
    heights, widths = (torch.tensor([box[side] for box in params]).double() for side in ("height", "width"))
    boxes = random_boxes(MANY, (50, 90), (50, 90), (0.08, 1.0), (3 / 4, 4 / 3))
    found = boxes.heights > 0
    assert found.double().mean() > 0.98
    at = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    ours = boxes.heights[found].double()
    assert torch.allclose(ours.quantile(at), heights.quantile(at), atol=1.1)
    ours = (boxes.heights * boxes.widths)[found].double()
    assert torch.allclose(ours.quantile(at), (heights * widths).quantile(at), atol=75)


def test_boxes_are_anywhere_within_the_image():
    boxes = random_boxes(MANY, (8, 6), (8, 6), (0.1, 0.2), (0.5, 2.0))
    assert (boxes.tops >= 0).all()
    assert (boxes.lefts >= 0).all()
    assert set((boxes.tops + boxes.heights).tolist()) <= set(range(1, 9))
    assert set((boxes.lefts + boxes.widths).tolist()) <= set(range(1, 7))
    two_by_three = (boxes.heights == 2) & (boxes.widths == 3)
    counts = torch.bincount(boxes.tops[two_by_three] * 4 + boxes.lefts[two_by_three], minlength=28)
    assert len(counts) == 28
    assert (counts.max() / counts.min()) < 1.6


def test_a_box_that_fits_in_no_try_is_the_central_crop():
    """As torchvision: the largest box of a shape within bounds, in the middle."""
    wide = torch.arange(100, dtype=torch.uint8).expand(1, 1, 10, 100).contiguous()
    view = crop(size=(10, 20), scale=(1.0, 1.0), ratio=(2.0, 2.0))(wide, CounterRNG(0, 0, torch.tensor([5])))
    assert torch.equal(view, wide[..., 40:60])
    tall = wide.transpose(2, 3).contiguous()
    view = crop(size=(20, 10), scale=(1.0, 1.0), ratio=(0.5, 0.5))(tall, CounterRNG(0, 0, torch.tensor([5])))
    assert torch.equal(view, tall[..., 40:60, :])


def test_default_is_the_whole_image():
    square = IMAGES[:, :, :, :19]
    assert torch.equal(crop(scale=(1.0, 1.0), ratio=(1.0, 1.0))(square, CounterRNG(0, 0, IDS)), square)


def test_images_of_one_pixel():
    pixels = torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1)
    assert torch.equal(crop(size=2)(pixels, CounterRNG(0, 0, IDS)), pixels.expand(40, 1, 2, 2))


def test_an_empty_batch():
    assert crop(size=8)(IMAGES[:0], CounterRNG(0, 0, IDS[:0])).shape == (0, 3, 8, 8)


def test_the_size_of_views():
    assert crop().output_size((19, 23)) == (19, 23)
    assert crop(size=64).output_size((19, 23)) == (64, 64)
    assert crop(size=(10, 12)).output_size((20, 24)) == (10, 12)
    with pytest.raises(RecipeError, match=r"10 x 12 would shrink images of 20 x 25 .* data\.image_size = 20 or less"):
        crop(size=(10, 12)).output_size((20, 25))


@pytest.mark.parametrize("wrong", [{"scale": (0.5, 0.2)}, {"scale": (0.1, 1.5)}, {"ratio": (0, 1)}, {"size": 0}])
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(RecipeError):
        crop(**wrong)


def test_a_recipe_may_give_two_sides():
    parsed = TypeAdapter(RandomResizedCrop).validate_json('{"name": "RandomResizedCrop", "size": [4, 6]}')
    assert parsed == crop(size=(4, 6))


def test_known_pixels_stay_known():
    """Stores of years ago hold what the teacher said about exactly these pixels."""
    pattern = (torch.arange(2 * 36) * 7 % 256).to(torch.uint8).reshape(2, 1, 6, 6)
    ids = torch.tensor([17, 2**62])
    view = crop(size=(3, 4))(pattern, CounterRNG(9, 2, ids))
    assert view[:, 0].tolist() == KNOWN


def test_every_machine_draws_the_same_boxes():
    """So many samples that every place of the table of shapes is looked up."""
    boxes = random_boxes(MANY, (480, 640), (480, 640), (0.08, 1.0), (3 / 4, 4 / 3))
    assert torch.stack(boxes)[:, :3].T.tolist() == KNOWN_BOXES
    assert hashlib.sha256(torch.stack(boxes).numpy().tobytes()).hexdigest()[:16] == KNOWN_DIGEST


KNOWN = [
    [[56, 63, 70, 77], [112, 119, 126, 133], [168, 175, 182, 189]],
    [[31, 38, 45, 52], [115, 122, 129, 136], [199, 206, 213, 220]],
]
KNOWN_BOXES = [[25, 24, 371, 430], [0, 47, 431, 423], [72, 172, 362, 410]]
KNOWN_DIGEST = "c468f7b1af0e2c7e"
