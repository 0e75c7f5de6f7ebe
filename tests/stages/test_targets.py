"""A student finds the targets of its own samples: by id, in its views, from RAM or through the map."""

import dataclasses

import pytest
import torch
from tiny_road import LOSSES, STUDENT, VIEWS, make_tiny_store, squares, tiny_setup

from stages.datasets.image_set import ImageSet
from stages.errors import RecipeError
from stages.losses.hint import HintConfig
from stages.targets import Targets, join
from stages.train_student import build_lesson, fresh_student, open_teaching
from store import FingerprintMismatch, StoreError, open_store

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    make_tiny_store(tiny_setup(folder))
    return folder


def part(images: ImageSet, rows: torch.Tensor, **changes) -> ImageSet:
    chosen = {"images": images.images[rows], "labels": images.labels[rows], "sample_ids": images.sample_ids[rows]}
    return dataclasses.replace(images, **{**chosen, **changes})


def test_a_reordered_part_of_the_data_set_finds_its_rows(run):
    store = open_store(run / "store.zarr")
    rows = torch.randperm(300, generator=torch.Generator().manual_seed(2))[:90]
    targets = Targets([join(store, part(squares(300, 0), rows), ["stage2"])], CPU)
    indices = torch.tensor([5, 0, 80, 5])
    (said,) = targets.batch(1, indices)
    wanted = store.rows_of(squares(300, 0).sample_ids[rows[indices]].numpy())
    assert torch.equal(said.logits, torch.from_numpy(store.read_view("logits", 1)[wanted]).float())
    maps = torch.from_numpy(store.read_view("features/stage2", 1)[wanted]).float()
    assert torch.equal(said.features["stage2"], maps)


def test_memory_and_map_give_the_same(run):
    store = open_store(run / "store.zarr")
    source = join(store, squares(300, 0), ["stage2"])
    resident, mapped = Targets([source], CPU), Targets([source], CPU)
    mapped.residence = "mapped"
    indices = torch.randint(300, (64,), generator=torch.Generator().manual_seed(3))
    for view in range(VIEWS.num_views):
        one, other = resident.batch(view, indices)[0], mapped.batch(view, indices)[0]
        assert torch.equal(one.logits, other.logits)
        assert torch.equal(one.features["stage2"], other.features["stage2"])


def test_another_picture_under_a_known_id_is_refused(run):
    store, images = open_store(run / "store.zarr"), squares(300, 0)
    images.images[17, 0, 3, 3] += 1
    with pytest.raises(FingerprintMismatch, match=rf"pixel checksum of sample {images.sample_ids[17]}: stored \d+, "):
        join(store, images, [])


def test_another_label_under_a_known_id_is_refused(run):
    store, images = open_store(run / "store.zarr"), squares(300, 0)
    images.labels[4] = (images.labels[4] + 1) % 4
    with pytest.raises(FingerprintMismatch, match=rf"label of sample {images.sample_ids[4]}: stored \d, wanted \d"):
        join(store, images, [])


def test_samples_and_layers_that_the_store_lacks_are_named(run):
    store = open_store(run / "store.zarr")
    with pytest.raises(StoreError, match="has no targets for"):
        join(store, squares(301, 5), [])
    with pytest.raises(StoreError, match=r"no array 'features/stage1', only logits, features/stage2"):
        join(store, squares(300, 0), ["stage1"])


def test_another_view_recipe_or_too_few_views_are_refused(run):
    setup = tiny_setup(run)
    other = dataclasses.replace(setup, views=dataclasses.replace(VIEWS, flip=False))
    with pytest.raises(FingerprintMismatch, match=r"views.operations: stored .*flip.*wanted"):
        open_teaching([run / "store.zarr"], LOSSES, STUDENT, {}, other)
    more = dataclasses.replace(setup, views=dataclasses.replace(VIEWS, num_views=4))
    with pytest.raises(RecipeError, match="holds 3 views, the recipe wants 4"):
        open_teaching([run / "store.zarr"], LOSSES, STUDENT, {}, more)


def test_a_hint_to_a_store_that_is_not_there_is_refused(run):
    hint = HintConfig(loss="hint", layers=(("stage2", "stage2"),), store=1)
    with pytest.raises(RecipeError, match="names store 1; there are 1"):
        open_teaching([run / "store.zarr"], [hint], STUDENT, {}, tiny_setup(run))


def test_the_student_sees_the_very_view_that_the_targets_are_of(run):
    """Epoch e uses view e mod V, in pictures and in targets alike."""
    from stages.views import render

    setup = tiny_setup(run)
    network = fresh_student(STUDENT, 0, setup)
    teaching = open_teaching([run / "store.zarr"], LOSSES, STUDENT, {}, setup)
    lesson = build_lesson(network, teaching, 0, setup)
    store = open_store(run / "store.zarr")
    indices = torch.arange(20)
    ids = setup.train_set.sample_ids[:20].numpy()
    for epoch, view in ((0, 0), (2, 2), (3, 0), (7, 1)):
        batch = lesson.batch(epoch, indices, CPU)
        shown = render(setup.train_set.images[:20], setup.train_set.sample_ids[:20], view, VIEWS)
        assert torch.equal(batch.images, network.normalise(shown))
        assert torch.equal(batch.teachers[0].logits, torch.from_numpy(store.gather("logits", view, ids)).float())
