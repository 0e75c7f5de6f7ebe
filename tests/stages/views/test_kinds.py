"""Kinds of views: each image of a step in one view of each, which a store holds as views of its own."""

import dataclasses

import numpy as np
import pytest
import torch
from support.made_store import folder_bytes
from support.tiny_run import CACHE, LAYERS, LOSSES, STUDENT, TEACHER, make_tiny_store, tiny_context

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.cache_teacher.preview import show_views
from kdpipe.stages.cache_teacher.recheck import recompute
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.teacher import load_teacher
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.from_store import views_of_store
from kdpipe.stages.views.mix import MixConfig
from kdpipe.stages.views.renderer import Renderer, check_views
from kdpipe.store import FingerprintMismatch, open_store

CROP, FLIP = {"name": "RandomCrop", "padding": 1}, {"name": "RandomHorizontalFlip"}
STRONG = [CROP, {"name": "RandAugment", "num_ops": 2, "magnitude": 10}]
KINDS = Views(2, kinds={"weak": [CROP], "strong": STRONG, "plain": []})
IDS = torch.arange(30)
PARTNERS = torch.arange(0, 300, 3)
IMAGES = torch.randint(256, (30, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def renderer(views, **changes):
    return Renderer(dataclasses.replace(views, **changes), 1, (8, 8), PARTNERS)


def test_each_kind_has_its_operations_and_own_random_numbers():
    made = renderer(KINDS)
    for view in (0, 1, 3, 4, -3, -2):
        alone = renderer(Views(2, [CROP] if view % 3 == 0 else STRONG))
        assert torch.equal(made.render_batch(IMAGES, IDS, view), alone.render_batch(IMAGES, IDS, view))
        assert torch.equal(made.render_rows(IMAGES, IDS, IDS, view), alone.render_batch(IMAGES, IDS, view))
    assert torch.equal(made.render_batch(IMAGES, IDS, 5), IMAGES)
    assert KINDS.num_stored == 6
    assert [KINDS.name_of(view) for view in (0, 4)] == ["view 0, weak", "view 1, strong"]


def test_kinds_of_transforms_are_rendered_in_workers():
    resized = [{"name": "Resize", "size": [6, 6]}]
    made = renderer(Views(2, kinds={"one": resized, "other": [*resized, FLIP]}, engine="transforms"))
    alone = renderer(Views(2, [*resized, FLIP], engine="transforms"))
    assert made.shape == (1, 6, 6)
    pixels = IMAGES[0].numpy()
    assert torch.equal(made.render_image(pixels, 5, 3), alone.render_image(pixels, 5, 3))
    views = Views(kinds={"one": resized, "other": []}, engine="transforms")
    with pytest.raises(RecipeError, match=r"views.kinds give images of different sizes .*: one \(1, 6, 6\), other"):
        _ = renderer(views).shape


def test_kinds_of_a_view_share_partners():
    """So that a target of one kind is the target of the same mixture in another kind."""
    made = renderer(KINDS, mix=MixConfig(mixup_alpha=0.4, cutmix_alpha=1.0))
    drawn = [made.sample_mix(IDS, view) for view in range(6)]
    for one in drawn[1:3]:
        assert torch.equal(one.partner_ids, drawn[0].partner_ids)
        assert torch.equal(one.own_share, drawn[0].own_share)
    assert not torch.equal(drawn[3].partner_ids, drawn[0].partner_ids)


def test_identity_names_kinds_in_order_with_their_pixels():
    identity = renderer(KINDS).identity
    assert [kind["name"] for kind in identity["kinds"]] == ["weak", "strong", "plain"]
    weak = renderer(Views(2, [CROP])).identity
    assert [identity["kinds"][0][key] for key in ("operations", "probes_sha256")] == [
        weak.pop("operations"),
        weak.pop("probes_sha256"),
    ]
    assert {key: value for key, value in identity.items() if key != "kinds"} == weak
    assert renderer(KINDS, num_views=7).identity == identity
    swapped = dict(reversed(KINDS.kinds.items()))
    for changes in ({"seed": 1}, {"kinds": swapped}, {"kinds": {**KINDS.kinds, "plain": (FLIP,)}}):
        assert renderer(KINDS, **changes).identity != identity


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": {"weak": [CROP]}}, "views.kinds has one kind, weak: give two or more"),
        ({"kinds": KINDS.kinds, "operations": [CROP]}, "and views.operations those of all: remove one"),
        (
            {"kinds": KINDS.kinds, "transform": "python:a:b", "engine": "transforms"},
            "and views.transform those of all: remove one",
        ),
        ({"kinds": {"weak": [CROP], "strong": ["RandomCrop", "Flip"]}}, r"views.kinds.strong.1: the tensor engine has"),
    ],
)
def test_kinds_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        check_views(Views(**settings))
    with pytest.raises(RecipeError, match="Views: kinds"):
        Views(kinds={"a b": [CROP], "c": []})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    context = tiny_context(tmp_path_factory.mktemp("kinds"), views=KINDS)
    make_tiny_store(context)
    return context


def test_a_store_holds_the_kinds_of_each_view(run):
    path = run.run_dir / "store.zarr"
    store = open_store(path)
    assert store.num_views == 6
    assert views_of_store(store) == dataclasses.replace(
        KINDS, kinds={kind["name"]: tuple(kind["operations"]) for kind in run.view_identity()["kinds"]}
    )
    report = recompute(path, load_teacher(TEACHER, 0, run), run, num_rows=200, seed=0)
    assert report.differing == ()
    shown = show_views(run, store, 2, 99)
    assert shown.views == [f"view {view}, {kind}" for view in range(2) for kind in KINDS.kinds]
    original = run.train_set.images[run.train_set.sample_ids == shown.sample_ids[0]]
    assert torch.equal(shown.images[0, 2], original[0].cpu())
    assert not torch.equal(shown.images[0, 1], original[0].cpu())


def test_more_views_are_added_behind_the_first_ones(run):
    path, teacher = run.run_dir / "grown.zarr", load_teacher(TEACHER, 0, run)
    first = dataclasses.replace(run, views=dataclasses.replace(KINDS, num_views=1))
    cache_teacher(CACHE, path, teacher, LAYERS, first)
    before = folder_bytes(path / "logits")
    with pytest.raises(RecipeError, match="has 3 views, the recipe needs 6, 2 of each kind"):
        open_distillation([path], LOSSES, STUDENT, {}, run)
    cache_teacher(CACHE, path, teacher, LAYERS, run)
    kept = {name: content for name, content in folder_bytes(path / "logits").items() if name in before}
    assert {name for name in kept if kept[name] != before[name]} <= {"zarr.json"}
    whole, ids = open_store(run.run_dir / "store.zarr"), run.train_set.sample_ids.numpy()
    for view in range(6):
        rows = [store.gather("logits", view, ids) for store in (open_store(path), whole)]
        assert np.array_equal(*rows)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (Views(2, [CROP]), "The store has views of the kinds weak, strong, plain, the recipe views of one kind"),
        (
            Views(2, kinds={"weak": [CROP], "strong": STRONG}),
            "the kinds weak, strong, plain, the recipe views of the kinds weak, strong ",
        ),
        (dataclasses.replace(KINDS, kinds={**KINDS.kinds, "weak": (FLIP,)}), r"views.kinds.0.operations.0.name"),
    ],
)
def test_a_store_of_other_kinds_is_refused(run, views, message):
    with pytest.raises(FingerprintMismatch, match=message):
        open_distillation([run.run_dir / "store.zarr"], LOSSES, STUDENT, {}, dataclasses.replace(run, views=views))
