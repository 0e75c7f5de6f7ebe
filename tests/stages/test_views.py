"""A view is a pure function of (seed, sample id, view): batch, order and neighbours change nothing."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.views import ViewsConfig, identity, render

IMAGES = torch.randint(1, 256, (40, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IDS = torch.randperm(10**6, generator=torch.Generator().manual_seed(1))[:40]
BOTH = ViewsConfig(seed=5, crop_padding=2, flip=True)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(0, 2**63 - 1), st.integers(-1000, 10**6))
def test_neighbours_and_order_change_nothing(data, seed, view):
    config = dataclasses.replace(BOTH, seed=seed)
    whole = render(IMAGES, IDS, view, config)
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, 39), min_size=1, max_size=40)))
    assert torch.equal(render(IMAGES[chosen], IDS[chosen], view, config), whole[chosen])


@pytest.mark.parametrize("number", range(40))
def test_a_view_is_a_padded_crop_flipped_or_not(number):
    rendered = render(IMAGES, IDS, 3, BOTH)[number]
    original = IMAGES[number]
    candidates = []
    for source in (original, original.flip(2)):
        padded = torch.nn.functional.pad(source, (2, 2, 2, 2))
        crops = [padded[:, down : down + 9, right : right + 7] for down in range(5) for right in range(5)]
        candidates += crops
    assert any(torch.equal(rendered, candidate) for candidate in candidates)


def test_every_offset_and_both_sides_come_up_about_equally_often():
    ids = torch.arange(20_000)
    dot = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    dot[0, 0, 2, 2] = 255
    rendered = render(dot.expand(len(ids), 1, 5, 5), ids, 0, ViewsConfig(crop_padding=2))
    counts = (rendered[:, 0] == 255).sum(0)
    assert counts.sum() == len(ids)
    assert counts.min() > 0.85 * len(ids) / 25
    assert counts.max() < 1.15 * len(ids) / 25
    left = torch.zeros(1, 1, 1, 4, dtype=torch.uint8)
    left[..., 0] = 255
    mirrored = render(left.expand(len(ids), 1, 1, 4), ids, 0, ViewsConfig(flip=True))[:, 0, 0, 3] == 255
    assert 0.48 < mirrored.float().mean() < 0.52


def test_views_samples_and_seeds_differ():
    config = ViewsConfig(crop_padding=4)
    same = IMAGES[:1].expand(40, 3, 9, 7)
    first = render(same, IDS, 0, config)
    assert len({view.numpy().tobytes() for view in first}) > 20
    assert not torch.equal(first, render(same, IDS, 1, config))
    assert not torch.equal(first, render(same, IDS, 0, dataclasses.replace(config, seed=1)))


def test_known_pixels_stay_known():
    """Stores of years ago hold what the teacher said about exactly these pixels."""
    pattern = (torch.arange(2 * 16) * 7 % 256).to(torch.uint8).reshape(2, 1, 4, 4)
    rendered = render(pattern, torch.tensor([17, 2**62]), 2, ViewsConfig(seed=9, crop_padding=1, flip=True))
    assert rendered[0, 0].tolist() == KNOWN[0]
    assert rendered[1, 0].tolist() == KNOWN[1]


def test_no_augmentation_gives_the_images():
    assert torch.equal(render(IMAGES, IDS, 7, ViewsConfig()), IMAGES)


@pytest.mark.parametrize("change", [{"seed": 6}, {"crop_padding": 3}, {"flip": False}])
def test_an_edited_recipe_has_another_identity_and_other_probes(change):
    before, after = identity(BOTH, (3, 9, 7)), identity(dataclasses.replace(BOTH, **change), (3, 9, 7))
    assert before["probe_sha256"] != after["probe_sha256"]


def test_more_views_of_the_same_recipe_are_the_same_views():
    assert identity(BOTH, (1, 8, 8)) == identity(dataclasses.replace(BOTH, num_views=99), (1, 8, 8))


KNOWN = [
    [[21, 14, 7, 0], [49, 42, 35, 28], [77, 70, 63, 56], [105, 98, 91, 84]],
    [[140, 147, 154, 161], [168, 175, 182, 189], [196, 203, 210, 217], [0, 0, 0, 0]],
]
