"""Required features are the same from a stored statistic or a stored map, and match the teacher's."""

import copy
import dataclasses
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.device import DEVICE
from support.tiny_run import CACHE, TEACHER, VIEWS, squares, tiny_context

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.cache_teacher.cache import layers_of
from kdpipe.stages.cache_teacher.recheck import recompute
from kdpipe.stages.data.loader.image_loader import ViewRequest
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.models.hooks import extract_features
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.targets.feature_spec import (
    INPUT,
    INPUT_GRADIENT,
    STATISTIC_FUNCTIONS,
    UNPOOLABLE,
    FeatureSpec,
    parse_feature,
    parse_statistic,
    statistic_shape,
)
from kdpipe.stages.targets.join import join
from kdpipe.stages.targets.reader import Targets
from kdpipe.stages.targets.resolve import arrays_needed, resolve_feature, smallest_feature
from kdpipe.stages.teacher import untrained_teacher
from kdpipe.stages.views.mix import MixConfig
from kdpipe.store import StoreError, finish_store, open_store, write_unit
from kdpipe.store.format.markers import marker_path

GRAY = squares(40, 0)
TEST = squares(8, 1, "test")

COLORED = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
COLORS = dataclasses.replace(GRAY, images=COLORED)
COLORED_TEST = dataclasses.replace(TEST, images=COLORED[:8])
SCALING = Normalization((0.4, 0.5, 0.6), (0.1, 0.5, 1.5))

NO_HEAD = SimpleNamespace(head=None)

MAPS = {"stage1": (8, 8, 8), "stage2": (16, 4, 4), "fc": (4,)}
SIZES = (None, (3, 3), (4, 4), (16, 16))
ONE_UNIT = dataclasses.replace(CACHE, shard_bytes=2**24)
REQUIRED = [
    *[FeatureSpec(layer, "pooled") for layer in MAPS],
    *[
        FeatureSpec(layer, form, size)
        for layer in ("stage1", "stage2")
        for form in ("features", "attention", "gram", "spatial_gram")
        for size in SIZES
    ],
]
BY_HAND = [
    FeatureSpec("stage1", "attention", (4, 4)),
    FeatureSpec("stage1", "spatial_gram", (4, 4)),
    FeatureSpec(INPUT, INPUT_GRADIENT),
]


def setup_of(run, images=GRAY, **changes):
    return tiny_context(run, train_set=images, test_set=TEST if images is GRAY else COLORED_TEST, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two stores of one teacher: of its maps, and of all statistics without maps."""
    folder = tmp_path_factory.mktemp("serving")
    context = setup_of(folder, views=dataclasses.replace(VIEWS, num_views=2))
    teacher = untrained_teacher(TEACHER, 0, context)
    maps = [FeatureSpec(layer) for layer in MAPS]
    statistics = [feature for feature in dict.fromkeys(map(kept, REQUIRED)) if feature not in maps]
    cache_teacher(ONE_UNIT, folder / "maps.zarr", teacher, maps, context)
    cache_teacher(ONE_UNIT, folder / "statistics.zarr", teacher, statistics, context)
    return folder


@pytest.fixture(scope="module")
def served(run):
    """Return all required features from the maps and from the statistics: by `FeatureSpec`, [20, ...]."""
    found = []
    indices = torch.arange(0, 40, 2)
    for name in ("maps", "statistics"):
        store = open_store(run / f"{name}.zarr")
        features = REQUIRED if name == "maps" else STATISTICS
        targets = Targets([join(store, GRAY, features)], DEVICE)
        found.append(targets.features(0, 1, indices, features))
    return found


def kept(feature):
    """Return what a store holds for it: without a size if nothing is pooled, unless the array hides its maps' size."""
    return feature if feature.statistic == "gram" else feature.for_shape(MAPS[feature.layer])


STATISTICS = [feature for feature in REQUIRED if kept(feature).kind != "features"]
"""Without whole maps in their own size."""


@pytest.mark.parametrize("feature", STATISTICS, ids=str)
def test_stored_statistic_equals_that_of_the_stored_map(served, feature):
    of_map, of_statistic = (found[feature] for found in served)
    assert of_statistic.shape[1:] == statistic_shape(feature, MAPS[feature.layer])
    largest = float(of_map.abs().max())
    assert largest > 0
    torch.testing.assert_close(of_statistic, of_map, rtol=3e-3, atol=2e-3 * largest)


def test_exact_array_is_preferred(run):
    store = open_store(run / "statistics.zarr")
    for feature in STATISTICS:
        source = resolve_feature(store, feature)
        assert (source.array, source.computed) == (kept(feature).array, None), feature
    maps = open_store(run / "maps.zarr")
    assert arrays_needed(maps, REQUIRED) == ["logits", "features/stage1", "features/stage2", "features/fc"]
    assert arrays_needed(maps, []) == ["logits"]


@pytest.mark.parametrize(
    ("feature", "shape", "stored"),
    [
        ("a:attention", (8, 8, 8), "a:attention"),
        ("a:attention-4x4", (8, 8, 8), "a:attention-4x4"),
        ("a:attention-8x8", (8, 8, 8), "a:attention"),
        ("a:attention-16x16", (8, 8, 8), "a:attention"),
        ("a:attention", (1, 8, 8), "a"),
        ("a:attention-4x4", (1, 8, 8), "a:attention-4x4"),
        ("a:spatial_gram", (16, 4, 4), "a"),
        ("a:spatial_gram", (17, 4, 4), "a:spatial_gram"),
        ("a:spatial_gram-2x2", (2, 4, 4), "a:spatial_gram-2x2"),
        ("a:gram", (16, 4, 4), "a"),
        ("a:gram", (15, 4, 4), "a:gram"),
        ("a:gram-8x8", (8, 8, 8), "a:gram-8x8"),
        ("a:pooled", (16, 1, 1), "a"),
        ("a:pooled", (16,), "a"),
        ("a:pooled", (16, 4, 4), "a:pooled"),
        ("a:pooled", (9, 16), "a:pooled"),
        ("a:features-4x4", (8, 8, 8), "a:features-4x4"),
        ("a:features-8x8", (8, 8, 8), "a"),
        ("input:input_gradient", (3, 8, 8), "input:input_gradient"),
        ("input:input_gradient", (1, 8, 8), "input:input_gradient"),
    ],
)
def test_the_smaller_of_map_and_statistic_is_stored(feature, shape, stored):
    assert str(smallest_feature(parse_feature(feature), shape)) == stored


layers = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}(\.[A-Za-z0-9_]{1,6}){0,3}", fullmatch=True)
sizes = st.none() | st.tuples(st.integers(1, 99_999), st.integers(1, 99_999))
small = st.integers(1, 9)


def any_form(sizes):
    """A statistic and a valid size."""
    return st.sampled_from(sorted(STATISTIC_FUNCTIONS)).flatmap(
        lambda form: st.tuples(st.just(form), st.none() if form in UNPOOLABLE else sizes)
    )


@given(layers, any_form(sizes))
def test_every_statistic_parses_its_own_name(layer, form):
    feature = FeatureSpec(INPUT if form[0] == INPUT_GRADIENT else layer, *form)
    assert parse_feature(str(feature)) == feature
    kind, _, path = feature.array.partition("/")
    assert parse_statistic(path, kind) == feature


@pytest.mark.parametrize(
    "text",
    [
        "",
        "layer1:input_gradient",
        ":pooled",
        "layer1:",
        "layer1:whole",
        "layer1:attention-",
        "layer1:attention-8",
        "layer1:attention-0x8",
        "layer1:attention-08x8",
        "layer1:attention-8x8x8",
        "layer1:attention-8x8 ",
        "layer1:pooled-2x2",
        "input:input_gradient-2x2",
        "layer1:pooled:pooled",
    ],
)
def test_invalid_statistic_error_lists_the_valid_ones(text):
    with pytest.raises(RecipeError, match=re.escape(repr(text)) + ".*pooled, mean_std, attention, gram"):
        parse_feature(text)


def of_map(form):
    return form[0] != INPUT_GRADIENT


@given(any_form(st.none() | st.tuples(small, small).map(lambda pair: (pair[0],) * 2)), small, small)
def test_stored_feature_serves_the_loss_and_is_small(form, channels, side):
    """Of square maps, as networks give them."""
    shape = (channels, side, side)
    feature = FeatureSpec("layer1" if of_map(form) else INPUT, *form)
    stored = smallest_feature(feature, shape)
    stored_shape = statistic_shape(stored, shape)
    assert stored.source == feature.source
    assert math.prod(stored_shape) <= math.prod(shape)
    store = SimpleNamespace(
        path="store.zarr", arrays=[SimpleNamespace(name=stored.array, row_shape=stored_shape)], manifest=NO_HEAD
    )
    source = resolve_feature(store, feature)
    assert source.array == stored.array
    assert source.shape == statistic_shape(feature, shape)
    assert source(torch.ones(2, *stored_shape)).shape == (2, *source.shape)


def test_input_gradient_is_not_computed_from_a_map(run):
    """Not even from a module named `input`."""
    store = SimpleNamespace(
        path="a.zarr", arrays=[SimpleNamespace(name="features/input", row_shape=(3, 8, 8))], manifest=NO_HEAD
    )
    with pytest.raises(StoreError, match=r"has no input_gradient of 'input', only features/input"):
        resolve_feature(store, FeatureSpec(INPUT, INPUT_GRADIENT))


@pytest.mark.parametrize("feature", [*BY_HAND, FeatureSpec("stage1", size=(4, 4)), FeatureSpec("fc")], ids=str)
def test_missing_feature_error_has_the_line_that_adds_it(run, tmp_path, feature):
    context, path = setup_of(run), tmp_path / "a.zarr"
    teacher = untrained_teacher(TEACHER, 0, context)
    cache_teacher(ONE_UNIT, path, teacher, [], context)
    with pytest.raises(StoreError) as raised:
        join(open_store(path), GRAY, [feature])
    sentence = str(raised.value)
    assert f"a.zarr has no {feature.kind} of {feature.layer!r}, only logits: run `kdpipe cache-teacher`" in sentence
    (line,) = re.findall(r"cache\.layers = \['([^']*)'\]", sentence)
    cache_teacher(ONE_UNIT, path, teacher, [parse_feature(line)], context)
    source = resolve_feature(open_store(path), feature)
    assert (source.array, source.computed) == (feature.array, None)


def test_statistic_of_larger_maps_is_not_used_for_smaller(run):
    """Attention over 8 x 8 positions cannot be averaged down to what is attention over 4 x 4."""
    arrays = [SimpleNamespace(name="attention/a", row_shape=(8, 8)), SimpleNamespace(name="logits", row_shape=(4,))]
    store = SimpleNamespace(path="a.zarr", arrays=arrays, manifest=NO_HEAD)
    with pytest.raises(StoreError, match=r"has no attention-4x4 of 'a', only attention/a, logits"):
        resolve_feature(store, FeatureSpec("a", "attention", (4, 4)))
    assert resolve_feature(store, FeatureSpec("a", "attention", (8, 8))).array == "attention/a"
    arrays[0] = SimpleNamespace(name="spatial_gram/a", row_shape=(64, 64))
    with pytest.raises(StoreError, match=r"has no spatial_gram-4x4 of 'a'"):
        resolve_feature(store, FeatureSpec("a", "spatial_gram", (4, 4)))
    assert resolve_feature(store, FeatureSpec("a", "spatial_gram", (8, 8))).array == "spatial_gram/a"
    arrays[0] = SimpleNamespace(name="gram/a", row_shape=(4, 4))  # 4 channels of unknown positions
    with pytest.raises(StoreError, match=r"has no gram-8x8 of 'a'"):
        resolve_feature(store, FeatureSpec("a", "gram", (8, 8)))
    assert resolve_feature(store, FeatureSpec("a", "gram")).array == "gram/a"


def test_map_statistics_of_vectors_are_an_error(run):
    with pytest.raises(ModelError, match=r"fc outputs \[4\] per sample: attention needs feature maps \[C, H, W\]"):
        resolve_feature(open_store(run / "maps.zarr"), FeatureSpec("fc", "attention"))


MIXES = {
    "labels": None,
    "mixup": MixConfig(mixup_alpha=1.0, p=0.7),
    "cutmix": MixConfig(cutmix_alpha=1.0, p=0.7),
}


@pytest.fixture(scope="module", params=MIXES)
def cached(request, tmp_path_factory):
    """A store of color images, its teacher and setup: channels have different scales."""
    folder = tmp_path_factory.mktemp("by_hand")
    context = setup_of(folder, COLORS, views=dataclasses.replace(VIEWS, mix=MIXES[request.param], num_views=2))
    teacher = dataclasses.replace(untrained_teacher(TEACHER, 1, context), normalize=SCALING)
    path = folder / "store.zarr"
    cache_teacher(ONE_UNIT, path, teacher, BY_HAND, context)
    return context, teacher, path


def by_hand(context, teacher, positions, view):
    """The arrays of BY_HAND, one sample after the other, by the plain formulas in float64."""
    model = copy.deepcopy(teacher.model).cpu().double()
    labels = dict(zip(COLORS.sample_ids.tolist(), COLORS.labels.tolist(), strict=True))
    seen = context.train_loader.get(ViewRequest(positions, view))
    images = seen.images.cpu().double() / 255
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (SCALING.mean, SCALING.std))
    rows = {feature.array: [] for feature in BY_HAND}
    for number, sample_id in enumerate(COLORS.sample_ids[positions].tolist()):
        pixels = images[number].clone().requires_grad_()
        with extract_features(model, ["stage1"]) as extractor:
            outputs = extractor(((pixels - mean) / std)[None])
        share, partner = 1.0, sample_id
        if seen.mixture is not None:
            share, partner = float(seen.mixture.own_share[number]), int(seen.mixture.partner_ids[number])
        logs = outputs.logits[0].log_softmax(0)
        cross_entropy = -share * logs[labels[sample_id]] - (1 - share) * logs[labels[partner]]
        (gradient,) = torch.autograd.grad(cross_entropy, pixels)
        averaged = outputs.features["stage1"][0].detach().reshape(8, 4, 2, 4, 2).mean((2, 4))
        energy = averaged.square().sum(0)
        channels = averaged.flatten(1)
        lengths = channels.square().sum(1, keepdim=True).sqrt()
        channels = channels / torch.where(lengths > 0, lengths, 1)
        looks = gradient.square().sum(0)
        rows[BY_HAND[0].array].append(energy / energy.square().sum().sqrt())
        rows[BY_HAND[1].array].append(channels.t() @ channels / 8)
        rows[BY_HAND[2].array].append(looks / looks.square().sum().sqrt())
    return {name: torch.stack(found) for name, found in rows.items()}


@pytest.mark.parametrize("view", [0, 1])
def test_stored_values_match_the_formulas(cached, view):
    context, teacher, path = cached
    positions = torch.arange(0, 40, 3)
    store = open_store(path)
    for name, expected in by_hand(context, teacher, positions, view).items():
        found = torch.from_numpy(store.gather(name, view, COLORS.sample_ids[positions].numpy())).double()
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_mixed_images_use_both_labels(cached):
    """Otherwise the test above would not cover mixtures."""
    context, _, _ = cached
    mixture = context.train_loader.get(ViewRequest(torch.arange(0, 40, 3), 0)).mixture
    if context.views.mix is not None:
        labels = dict(zip(COLORS.sample_ids.tolist(), COLORS.labels.tolist(), strict=True))
        own = COLORS.labels[torch.arange(0, 40, 3)].tolist()
        partners = [labels[partner] for partner in mixture.partner_ids.tolist()]
        assert sum(partner != label for partner, label in zip(partners, own, strict=True)) > 3
    else:
        assert mixture is None


def test_store_keeps_its_features(cached):
    _, _, path = cached
    assert layers_of(open_store(path).manifest) == BY_HAND


def test_recheck_reproduces_the_stored_values(cached):
    context, teacher, path = cached
    compared = recompute(path, teacher, context, 1000, 0)
    assert (compared.num_rows, compared.differing) == (40, ())
    assert 0 < compared.largest_error < 0.5


@pytest.mark.parametrize("feature", BY_HAND, ids=str)
def test_changed_value_is_detected(cached, tmp_path, feature):
    context, teacher, whole = cached
    path = shutil.copytree(whole, tmp_path / "store.zarr")
    changed = change_a_number(path, feature.array, 1)
    differing = recompute(path, teacher, context, 1000, 0).differing
    assert {(mismatch.array, mismatch.view) for mismatch in differing} == {(feature.array, 1)}
    assert {mismatch.sample_id for mismatch in differing} <= changed
    assert len(differing) > 3


def change_a_number(path, array, view):
    """Add a little to one number of each row of a unit, with checksums that fit; returns the ids of the rows."""
    store = open_store(path)
    unit = store.units(view)[0]
    rows = {spec.name: store.read_unit(spec.name, unit).astype(spec.dtype) for spec in store.arrays}
    rows[array] = rows[array].copy()
    rows[array][:, 0, -1] += 0.1 * abs(rows[array]).max()
    marker_path(path, unit).unlink()
    write_unit(path, store.manifest, unit, rows)
    finish_store(path)
    return set(store.samples.ids[unit.start : unit.stop].tolist())
