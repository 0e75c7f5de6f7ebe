"""A view is a pure function of (seed, sample id, view): batch, order and neighbors change nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.views.rng import CounterRNG
from kdpipe.stages.views.tensor_engine import parse_operations

IMAGES = torch.randint(1, 256, (40, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IDS = torch.randperm(10**6, generator=torch.Generator().manual_seed(1))[:40]
CROP, FLIP = {"name": "RandomCrop", "padding": 2}, {"name": "RandomHorizontalFlip"}
EVERYTHING = (
    CROP,
    FLIP,
    {"name": "RandomVerticalFlip", "p": 0.3},
    {"name": "RandomResizedCrop", "scale": [0.3, 1.0]},
    {"name": "RandomAffine", "degrees": 20.0, "translate": [0.2, 0.2], "scale": [0.8, 1.2], "shear": 10.0},
    {"name": "ColorJitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    {"name": "RandomGrayscale", "p": 0.3},
    {"name": "RandAugment"},
    {"name": "TrivialAugmentWide"},
    {"name": "RandomErasing", "value": "random"},
    {"name": "Cutout", "size": 3},
)


def render(images, ids, view, *operations, seed=5):
    return parse_operations(operations)(images, CounterRNG(seed, view, ids))


@settings(deadline=None, max_examples=30)
@given(st.data(), st.integers(0, 2**63 - 1), st.integers(-1000, 10**6), st.sampled_from([1, 2]))
def test_neighbours_order_and_threads_change_nothing(data, seed, view, num_threads):
    whole = render(IMAGES, IDS, view, *EVERYTHING, seed=seed)
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, 39), min_size=1, max_size=40)))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(render(IMAGES[chosen], IDS[chosen], view, *EVERYTHING, seed=seed), whole[chosen])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", range(40))
def test_a_view_is_a_padded_crop_flipped_or_not(number):
    rendered = render(IMAGES, IDS, 3, CROP, FLIP)[number]
    padded = torch.nn.functional.pad(IMAGES[number], (2, 2, 2, 2))
    crops = [padded[:, down : down + 9, right : right + 7] for down in range(5) for right in range(5)]
    assert any(torch.equal(rendered, one) for crop in crops for one in (crop, crop.flip(2)))


def test_every_offset_and_both_sides_come_up_about_equally_often():
    ids = torch.arange(20_000)
    dot = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    dot[0, 0, 2, 2] = 255
    rendered = render(dot.expand(len(ids), 1, 5, 5), ids, 0, CROP)
    counts = (rendered[:, 0] == 255).sum(0)
    assert counts.sum() == len(ids)
    assert counts.min() > 0.85 * len(ids) / 25
    assert counts.max() < 1.15 * len(ids) / 25
    left = torch.zeros(1, 1, 1, 4, dtype=torch.uint8)
    left[..., 0] = 255
    mirrored = render(left.expand(len(ids), 1, 1, 4), ids, 0, FLIP)[:, 0, 0, 3] == 255
    assert 0.48 < mirrored.float().mean() < 0.52


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_fraction_flipped_is_p(share):
    ids = torch.arange(10_000)
    pair = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 2, 1).expand(len(ids), 1, 2, 1)
    flipped = render(pair, ids, 0, {"name": "RandomVerticalFlip", "p": share})[:, 0, 0, 0] == 255
    assert abs(float(flipped.float().mean()) - share) <= 0.02 * (0 < share < 1)


def test_views_samples_seeds_and_repetitions_differ():
    same = IMAGES[:1].expand(40, 3, 9, 7)
    wide = {"name": "RandomCrop", "padding": 4}
    first = render(same, IDS, 0, wide)
    assert len({view.numpy().tobytes() for view in first}) > 20
    assert not torch.equal(first, render(same, IDS, 1, wide))
    assert not torch.equal(first, render(same, IDS, 0, wide, seed=6))
    flips = [render(same, IDS, 0, *[FLIP] * count) for count in (1, 2)]
    assert not torch.equal(flips[1], same), "a second flip must not undo the first"


def test_known_pixels_stay_known():
    """Stores of years ago hold what the teacher said about exactly these pixels."""
    pattern = (torch.arange(2 * 16) * 7 % 256).to(torch.uint8).reshape(2, 1, 4, 4)
    rendered = render(pattern, torch.tensor([17, 2**62]), 2, {"name": "RandomCrop", "padding": 1}, FLIP, seed=9)
    assert rendered[0, 0].tolist() == KNOWN[0]
    assert rendered[1, 0].tolist() == KNOWN[1]


def test_no_operation_gives_the_images():
    assert torch.equal(render(IMAGES, IDS, 7), IMAGES)


@pytest.mark.parametrize("operation", EVERYTHING)
def test_inputs_are_unchanged(operation):
    before = IMAGES.clone()
    render(IMAGES, IDS, 0, operation)
    assert torch.equal(IMAGES, before)


@pytest.mark.parametrize(
    ("operation", "sentence"),
    [
        ({"name": "RandomCorp"}, "has no operation 'RandomCorp'.*did you mean 'RandomCrop'"),
        ({"name": "Pad"}, "views.engine = 'transforms' supports all"),
        ({"padding": 2}, "has no operation None"),
        ({"name": "RandomCrop", "pading": 2}, "RandomCrop has no argument 'pading'; did you mean 'padding'"),
        ({"name": "RandomCrop", "padding": -1}, "RandomCrop: padding = -1: it must be at least 0"),
        ({"name": "RandomCrop", "padding": "2"}, "RandomCrop: padding = 2: it must be a whole number"),
        ({"name": "RandomHorizontalFlip", "p": 1.5}, "p = 1.5"),
        ({"name": "Cutout"}, "Cutout requires 'size'"),
    ],
)
def test_a_wrong_operation_is_refused_by_number_and_name(operation, sentence):
    with pytest.raises(RecipeError, match=f"views.operations.1: .*{sentence}"):
        parse_operations([FLIP, operation])


@pytest.mark.parametrize(
    "operation",
    [
        {"name": "RandomHorizontalFlip", "p": 0.0},
        {"name": "RandomVerticalFlip", "p": 0.0},
        {"name": "ColorJitter"},
        {"name": "ColorJitter", "brightness": [1.0, 1.0], "hue": 0.0},
        {"name": "RandomGrayscale", "p": 0.0},
        {"name": "RandomErasing", "p": 0.0},
        {"name": "RandAugment", "num_ops": 0},
        {"name": "RandomAffine", "degrees": 0.0},
        {"name": "RandomAffine", "degrees": 0.0, "translate": [0.0, 0.0], "scale": [1.0, 1.0], "shear": [0.0, 0.0]},
    ],
)
def test_an_operation_that_changes_nothing_is_refused(operation):
    with pytest.raises(RecipeError, match=f"views.operations.1: {operation['name']} changes nothing"):
        parse_operations([FLIP, operation])


def test_a_crop_to_the_whole_image_is_refused():
    for arguments in ({"padding": 0}, {"size": [9, 7]}):
        with pytest.raises(RecipeError, match="RandomCrop to 9 x 7 with padding = 0 changes nothing"):
            parse_operations([{"name": "RandomCrop", **arguments}]).output_size((9, 7))


@pytest.mark.parametrize(("size", "padding"), [((32, 40), 4), ((9, 7), 1), ((28, 28), 3)])
def test_a_crop_is_padded_by_an_eighth_of_the_image(size, padding):
    images = torch.randint(0, 256, (40, 3, *size), dtype=torch.uint8)
    explicit = render(images, IDS, 0, {"name": "RandomCrop", "padding": padding})
    assert torch.equal(render(images, IDS, 0, {"name": "RandomCrop"}), explicit)
    assert not torch.equal(explicit, images)


def test_records_of_explicit_crops_are_those_of_old_stores():
    def record(**arguments):
        return parse_operations([{"name": "RandomCrop", **arguments}]).to_json()["operations"][0]

    assert record(size=4) == {"name": "RandomCrop", "size": 4, "padding": 0, "fill": 0}
    assert record(padding=2) == {"name": "RandomCrop", "size": None, "padding": 2, "fill": 0}
    assert record()["padding"] is None  # 0 in stores that were made when it changed nothing


def test_a_crop_that_could_miss_the_image_is_refused():
    with pytest.raises(RecipeError, match="could crop images of 9 x 7 to nothing"):
        parse_operations([{"name": "RandomCrop", "padding": 7}]).output_size((9, 7))


KNOWN = [
    [[21, 14, 7, 0], [49, 42, 35, 28], [77, 70, 63, 56], [105, 98, 91, 84]],
    [[140, 147, 154, 161], [168, 175, 182, 189], [196, 203, 210, 217], [0, 0, 0, 0]],
]


def test_crop_has_the_requested_size_at_any_position():
    ids = torch.arange(4000)
    ramp = torch.arange(30, dtype=torch.uint8).reshape(1, 1, 5, 6) + 1
    crops = render(ramp.expand(4000, 1, 5, 6), ids, 0, {"name": "RandomCrop", "size": [3, 4]})
    corners = torch.unique(crops[:, 0, 0, 0], return_counts=True)
    assert crops.shape[2:] == (3, 4)
    assert corners[0].tolist() == [1 + 6 * down + right for down in range(3) for right in range(3)]
    assert corners[1].min() > 0.8 * 4000 / 9
    engine = parse_operations([{"name": "RandomCrop", "size": 9, "padding": 1}])
    assert engine.output_size((7, 7)) == (9, 9)
    with pytest.raises(RecipeError, match="larger than images of 6 x 7"):
        engine.output_size((6, 7))


def test_a_crop_of_the_images_own_size_is_that_without_a_size():
    named = {"name": "RandomCrop", "size": [9, 7], "padding": 2}
    assert torch.equal(render(IMAGES, IDS, 1, named), render(IMAGES, IDS, 1, CROP))
