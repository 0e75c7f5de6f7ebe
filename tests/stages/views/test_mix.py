from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from scipy.special import betainc

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.views.mix import MixAssignment, MixConfig, mix, sample_mix
from kdpipe.stages.views.rng import CounterRNG

IDS = torch.arange(40) * 977
IMAGES = torch.randint(0, 256, (40, 3, 19, 23), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
OTHERS = torch.randint(0, 256, (40, 3, 19, 23), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
SIZE = (19, 23)
POPULATION = torch.arange(1000) * 977
MANY = CounterRNG(seed=3, view=1, sample_ids=torch.arange(50_000))

MIXUP, CUTMIX = MixConfig(mixup_alpha=0.4), MixConfig(cutmix_alpha=1.0)
BOTH = MixConfig(mixup_alpha=0.4, cutmix_alpha=1.0, p=0.8, cutmix_share=0.25)


def fields(mixture: MixAssignment):
    return [mixture.partner_ids, mixture.own_share, mixture.weights, *mixture.boxes]


@pytest.mark.parametrize("config", [MIXUP, CUTMIX, BOTH])
def test_a_mixture_depends_on_its_sample_alone(config):
    whole = sample_mix(config, CounterRNG(1, 2, IDS), POPULATION, SIZE)
    some = torch.tensor([31, 4, 4, 17])
    part = sample_mix(config, CounterRNG(1, 2, IDS[some]), POPULATION, SIZE)
    for one, all_ in zip(fields(part), fields(whole), strict=True):
        assert torch.equal(one, all_[some])
    assert torch.equal(mix(IMAGES[some], OTHERS[some], part), mix(IMAGES, OTHERS, whole)[some])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads):
    before = torch.get_num_threads()
    mixture = sample_mix(BOTH, CounterRNG(1, 2, IDS), POPULATION, SIZE)
    whole = mix(IMAGES, OTHERS, mixture)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(mix(IMAGES, OTHERS, sample_mix(BOTH, CounterRNG(1, 2, IDS), POPULATION, SIZE)), whole)
    finally:
        torch.set_num_threads(before)


def test_another_view_has_other_partners():
    first, second = (sample_mix(BOTH, CounterRNG(1, view, IDS), POPULATION, SIZE) for view in (0, 1))
    assert (first.partner_ids != second.partner_ids).sum() > 20


def test_partners_are_uniform_over_the_pool():
    partners = sample_mix(MIXUP, MANY, POPULATION, SIZE).partner_ids
    drawn = partners[partners != MANY.sample_ids]
    counts = torch.bincount(drawn // 977, minlength=1000)
    assert (drawn % 977 == 0).all()
    assert len(counts) == 1000
    assert counts.min() > 10
    assert counts.max() < 100


def test_a_sample_that_is_not_mixed_is_its_own_partner():
    mixture = sample_mix(MixConfig(mixup_alpha=0.4, cutmix_alpha=1.0, p=0.3), MANY, POPULATION, SIZE)
    assert torch.equal(mixture.mixed, mixture.own_share < 1)
    assert torch.equal(mixture.partner_ids[~mixture.mixed], MANY.sample_ids[~mixture.mixed])
    assert mixture.mixed.float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_mixing_never_leaves_the_images():
    mixture = sample_mix(MixConfig(mixup_alpha=0.4, p=0.0), CounterRNG(1, 2, IDS), POPULATION, SIZE)
    assert not mixture.mixed.any()
    assert torch.equal(mix(IMAGES, OTHERS, mixture), IMAGES)


def test_the_methods_share_the_mixed_samples():
    mixture = sample_mix(MixConfig(mixup_alpha=8.0, cutmix_alpha=8.0, cutmix_share=0.2), MANY, POPULATION, (64, 64))
    blended, cut = mixture.weights < 2**16, mixture.boxes.heights * mixture.boxes.widths > 0
    assert not (blended & cut).any()
    assert (blended | cut).float().mean() > 0.99
    assert cut.float().mean().item() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 8.0])
def test_the_share_follows_betas_law(alpha):
    shares = sample_mix(MixConfig(mixup_alpha=alpha), MANY, POPULATION, SIZE).own_share.double()
    assert shares.mean().item() == pytest.approx(0.5, abs=0.008)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.02)
    for at in (0.1, 0.3, 0.8):
        assert (shares <= at).double().mean().item() == pytest.approx(float(betainc(alpha, alpha, at)), abs=0.01)


@pytest.mark.parametrize("alpha", [1e-9, 1e9])
def test_extreme_laws(alpha):
    shares = sample_mix(MixConfig(mixup_alpha=alpha), MANY, POPULATION, SIZE).own_share
    assert ((shares - 0.5).abs() < 1e-3).all() if alpha > 1 else ((shares == 0) | (shares == 1)).all()


def test_mixup_weighs_both_images():
    mixture = sample_mix(MIXUP, CounterRNG(1, 2, IDS), POPULATION, SIZE)
    shares = mixture.own_share.double()[:, None, None, None]
    exact = shares * IMAGES + (1 - shares) * OTHERS
    assert mixture.mixed.sum() > 30
    assert torch.equal(mix(IMAGES, OTHERS, mixture), (exact + 0.5).floor().to(torch.uint8))


def test_cutmix_own_share_is_the_exact_pixel_fraction():
    own, reference_result = (
        torch.zeros(2000, 1, 19, 23, dtype=torch.uint8),
        torch.ones(2000, 1, 19, 23, dtype=torch.uint8),
    )
    mixture = sample_mix(CUTMIX, MANY.at(torch.arange(2000)), POPULATION, SIZE)
    kept = (mix(own, reference_result, mixture) == 0).flatten(1).sum(1)
    assert torch.equal(mixture.own_share, (kept.double() / (19 * 23)).float())
    assert kept.min() < 100
    assert kept.max() == 19 * 23


def test_unclipped_cutmix_boxes_have_the_image_aspect():
    """Sides are those of the image times sqrt(1 - lambda), to an even number of pixels: as the paper's code."""
    mixture = sample_mix(CUTMIX, MANY, POPULATION, (200, 100))
    tops, lefts, heights, widths = mixture.boxes
    inner = (tops > 0) & (lefts > 0) & (tops + heights < 200) & (lefts + widths < 100) & (heights > 0)
    assert inner.sum() > 1000
    assert ((heights - 2 * widths)[inner].abs() <= 4).all()
    assert (heights[inner] % 2 == 0).all()


def test_cutmix_boxes_take_the_area_that_lambda_leaves_them():
    mixture = sample_mix(CUTMIX, MANY, POPULATION, (1000, 1000))
    # at alpha = 1 the share 1 - lambda = s^2 is uniform; of a side s, centerd anywhere, the border leaves s - s^2 / 4
    # on average, in each direction for itself: E[(s - s^2/4)^2] = E[s^2] - E[s^3] / 2 + E[s^4] / 16
    expected = 1 / 2 - (2 / 5) / 2 + (1 / 3) / 16
    assert (1 - mixture.own_share).double().mean().item() == pytest.approx(expected, abs=0.005)


@given(st.sampled_from([MIXUP, CUTMIX, BOTH]), st.integers(0, 2**63 - 1), st.integers(-5, 5))
def test_mixing_with_itself_leaves_the_picture(config, seed, view):
    mixture = sample_mix(config, CounterRNG(seed, view, IDS), POPULATION, SIZE)
    assert torch.equal(mix(IMAGES, IMAGES, mixture), IMAGES)


def test_the_images_are_left_alone():
    images, others = IMAGES.clone(), OTHERS.clone()
    mixed = mix(images, others, sample_mix(BOTH, CounterRNG(1, 2, IDS), POPULATION, SIZE))
    assert not torch.equal(mixed, IMAGES)
    assert torch.equal(images, IMAGES)
    assert torch.equal(others, OTHERS)


def test_batches_larger_than_a_slice_give_the_same_images():
    images = torch.randint(0, 256, (6, 3, 150, 190), dtype=torch.uint8)
    mixture = sample_mix(MIXUP, CounterRNG(1, 2, IDS[:6]), POPULATION, (150, 190))
    alone = [
        mix(images[b : b + 1], images[:1], sample_mix(MIXUP, CounterRNG(1, 2, IDS[b : b + 1]), POPULATION, (150, 190)))
        for b in range(6)
    ]
    assert torch.equal(mix(images, images[:1].expand_as(images), mixture), torch.cat(alone))


@pytest.mark.parametrize("shape", [(5, 1, 1, 1), (5, 3, 1, 7), (0, 3, 4, 4)])
@pytest.mark.parametrize("config", [MIXUP, CUTMIX, BOTH])
def test_small_images(config, shape):
    images = torch.full(shape, 200, dtype=torch.uint8)
    mixture = sample_mix(config, CounterRNG(0, 0, torch.arange(shape[0])), POPULATION, (shape[2], shape[3]))
    assert mix(images, images // 2, mixture).shape == shape
    assert mixture.own_share.shape == shape[:1]


def test_a_section_that_mixes_nothing_is_refused():
    with pytest.raises(RecipeError, match="needs a mixup_alpha or a cutmix_alpha above 0"):
        MixConfig()
    with pytest.raises(RecipeError):
        MixConfig(mixup_alpha=-1.0)
    with pytest.raises(ValidationError):
        TypeAdapter(MixConfig).validate_json('{"mixup_alpha": 1.0, "alpha": 2}')


def test_reference_images_are_unchanged():
    """Stores of years ago hold what the teacher said about exactly these pixels."""
    own = (torch.arange(4 * 16) * 7 % 256).to(torch.uint8).reshape(4, 1, 4, 4)
    config = MixConfig(mixup_alpha=1.0, cutmix_alpha=1.0)
    mixture = sample_mix(config, CounterRNG(9, 2, torch.tensor([17, 2**62, 3, 5])), torch.arange(100), (4, 4))
    assert mixture.partner_ids.tolist() == KNOWN_PARTNERS
    assert mixture.own_share.tolist() == KNOWN_SHARES
    assert mix(own, own.flip(0), mixture)[:, 0].tolist() == KNOWN_PIXELS


@pytest.mark.parametrize("config", [MIXUP, CUTMIX, BOTH])
def test_every_machine_draws_the_same_mixtures(config):
    """So many samples that every place of the table of shares is looked up."""
    digest = hashlib.sha256()
    for tensor in fields(sample_mix(config, MANY, POPULATION, (224, 224))):
        digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest()[:16] == KNOWN_DIGESTS[config]


KNOWN_PARTNERS = [35, 64, 36, 88]
KNOWN_SHARES = [0.875, 0.75, 0.75, 0.1312255859375]
KNOWN_PIXELS = [
    [[0, 7, 14, 21], [28, 35, 42, 49], [136, 63, 70, 77], [164, 91, 98, 105]],
    [[112, 119, 126, 133], [252, 3, 154, 161], [24, 31, 182, 189], [196, 203, 210, 217]],
    [[224, 231, 238, 245], [252, 147, 154, 17], [24, 175, 182, 45], [52, 59, 66, 73]],
    [[10, 17, 24, 31], [38, 45, 52, 59], [66, 73, 80, 87], [94, 101, 108, 115]],
]
KNOWN_DIGESTS = {MIXUP: "fc362bd895d237e8", CUTMIX: "a70b3271d750e9cb", BOTH: "77f2026b3b2e67a2"}
