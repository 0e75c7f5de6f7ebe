"""Targets are joined by id, in the right view, from RAM, mapped or streamed."""

import dataclasses

import pytest
import torch
from support.device import DEVICE
from support.tiny_run import (
    LOSSES,
    OPERATIONS,
    STUDENT,
    TEACHER,
    VIEWS,
    make_tiny_store,
    squares,
    stored_rows,
    tiny_context,
)

from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.loader.sampling import shard_order
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.task_builder import build_student, build_task
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.features.hint import Hint
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.join import join
from kdpipe.stages.targets.reader import TargetLoadingConfig, Targets
from kdpipe.stages.views.renderer import Renderer
from kdpipe.store import FingerprintMismatch, StoreError, TargetStore, open_store
from kdpipe.store.read import mapped_views

STAGE2 = FeatureSpec("stage2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    make_tiny_store(tiny_context(folder))
    return folder


def subset(images: ImageSet, rows: torch.Tensor, **changes) -> ImageSet:
    chosen = {"images": images.images[rows], "labels": images.labels[rows], "sample_ids": images.sample_ids[rows]}
    return dataclasses.replace(images, **{**chosen, **changes})


def test_reordered_subset_is_joined_by_id(run):
    store = open_store(run / "store.zarr")
    rows = torch.randperm(300, generator=torch.Generator().manual_seed(2))[:90]
    targets = Targets([join(store, subset(squares(300, 0), rows), [STAGE2])], DEVICE)
    indices = torch.tensor([5, 0, 80, 5])
    (outputs,) = targets.batch(1, indices)
    ids = squares(300, 0).sample_ids[rows[indices]]
    assert torch.equal(outputs.logits, stored_rows(store, "logits", 1, ids))
    assert torch.equal(outputs.features[STAGE2], stored_rows(store, "features/stage2", 1, ids))


def test_memory_and_mapped_targets_are_equal(run):
    store = open_store(run / "store.zarr")
    source = join(store, squares(300, 0), [STAGE2])
    resident, mapped = Targets([source], DEVICE), Targets([source], DEVICE)
    mapped.residence = "mapped"
    indices = torch.randint(300, (64,), generator=torch.Generator().manual_seed(3))
    for view in range(VIEWS.num_views):
        first, second = resident.batch(view, indices)[0], mapped.batch(view, indices)[0]
        assert torch.equal(first.logits, second.logits)
        assert torch.equal(first.features[STAGE2], second.features[STAGE2])


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A store of many shards of 512 rows."""
    folder = tmp_path_factory.mktemp("long")
    context = tiny_context(folder, train_set=squares(6000, 0))
    short = dataclasses.replace(TEACHER.train, epochs=1, batch_size=1000)  # any outputs will do
    make_tiny_store(context, teacher=dataclasses.replace(TEACHER, train=short))
    return folder


IN_MEMORY = TargetLoadingConfig(device_bytes=0)
SLAB_BYTES = 512 * (4 * 2 + 16 * 4 * 4 * 2)


def streamed_within(num_slabs: int) -> TargetLoadingConfig:
    return TargetLoadingConfig(memory_bytes=num_slabs * SLAB_BYTES, mapped_bytes=0)


def test_streamed_targets_are_equal_within_their_memory_bound(long_run):
    store = open_store(long_run / "store.zarr")
    assert store.unit_rows == 512
    source = join(store, squares(6000, 0), [STAGE2])
    resident, streamed = (Targets([source], DEVICE, config) for config in (IN_MEMORY, streamed_within(8)))
    assert (resident.residence, streamed.residence, streamed.window) == ("memory", "streamed", 4)
    assert "streamed in groups of 4 shards" in streamed.describe()[0]
    (inner,) = streamed._sources
    most_bytes = 0
    for epoch in range(2):
        order = shard_order(1, epoch, streamed.slabs, streamed.window)
        for indices in order.split(100):
            first, second = resident.batch(epoch, indices)[0], streamed.batch(epoch, indices)[0]
            assert torch.equal(first.logits, second.logits)
            assert torch.equal(first.features[STAGE2], second.features[STAGE2])
            most_bytes = max(most_bytes, inner.store._cache.num_bytes)
    assert 4 * SLAB_BYTES < most_bytes <= 8 * SLAB_BYTES


def test_an_epoch_in_slab_order_reads_each_slab_once(long_run, monkeypatch):
    store = open_store(long_run / "store.zarr")
    read, real = [], TargetStore.read_unit
    monkeypatch.setattr(TargetStore, "read_unit", lambda self, name, unit: read.append(unit) or real(self, name, unit))
    config = TargetLoadingConfig(memory_bytes=8 * 512 * 4 * 2, mapped_bytes=0)
    targets = Targets([join(store, squares(6000, 0), [])], DEVICE, config)
    for indices in shard_order(1, 0, targets.slabs, targets.window).split(64):
        targets.batch(0, indices)
    assert sorted(read) == store.units(0)


def test_slab_order_depends_on_seed_and_epoch_and_mixes():
    slabs = torch.arange(4000) // 100
    orders = [shard_order(seed, epoch, slabs, 4) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert torch.equal(orders[0], shard_order(0, 0, slabs, 4))
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(4000))
        groups = [set(slabs[order[start : start + 400]].tolist()) for start in range(0, 4000, 400)]
        assert [len(group) for group in groups] == [4] * 10  # a group of slabs at a time, mixed within
        assert len(slabs[order[:64]].unique()) == 4
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_residence_depends_on_size_alone(run):
    store = open_store(run / "store.zarr")
    source = join(store, squares(300, 0), [STAGE2])
    num_bytes = store.num_views * store.num_rows * (4 + 16 * 4 * 4) * 2
    for device, memory, mapped, expected in (
        (num_bytes, num_bytes, 0, "device" if DEVICE.type == "cuda" else "memory"),
        (num_bytes - 1, num_bytes, 0, "memory"),
        (num_bytes - 1, num_bytes - 1, num_bytes, "mapped"),
        (num_bytes, num_bytes - 1, num_bytes - 1, "streamed"),
    ):
        targets = Targets(
            [source], DEVICE, TargetLoadingConfig(device_bytes=device, memory_bytes=memory, mapped_bytes=mapped)
        )
        assert targets.residence == expected


@pytest.mark.parametrize(("verify", "num_checks"), [("first", 1), ("always", 2), ("never", 0)])
def test_mapped_targets_are_checked_as_configured(run, monkeypatch, verify, num_checks):
    checked, store = [], open_store(run / "store.zarr")
    monkeypatch.setattr(mapped_views, "is_committed_file", lambda file, entry, root: checked.append(file) or True)
    config = TargetLoadingConfig(device_bytes=0, memory_bytes=0, verify=verify)
    targets = Targets([join(store, squares(300, 0), [])], DEVICE, config)
    for view in (0, 1, 0):
        targets.batch(view, torch.arange(4))
    assert targets.residence == "mapped"
    first = [file for file in checked if file.parts[-3:-1] == ("0", "0")]
    assert len(first) == num_checks


def test_changed_pixels_of_a_known_id_are_an_error(run):
    store, images = open_store(run / "store.zarr"), squares(300, 0)
    images.images[17, 0, 3, 3] += 1
    with pytest.raises(FingerprintMismatch, match=rf"pixel checksum of sample {images.sample_ids[17]}: stored \d+, "):
        join(store, images, [])


def test_changed_label_of_a_known_id_is_an_error(run):
    store, images = open_store(run / "store.zarr"), squares(300, 0)
    images.labels[4] = (images.labels[4] + 1) % 4
    with pytest.raises(FingerprintMismatch, match=rf"label of sample {images.sample_ids[4]}: stored \d, wanted \d"):
        join(store, images, [])


def test_missing_samples_and_layers_are_named(run):
    store = open_store(run / "store.zarr")
    with pytest.raises(StoreError, match="has no targets for"):
        join(store, squares(301, 5), [])
    with pytest.raises(StoreError, match=r"no features of 'stage1', only logits, features/stage2: run"):
        join(store, squares(300, 0), [FeatureSpec("stage1")])


def test_other_view_recipe_or_too_few_views_are_errors(run):
    context = tiny_context(run)
    other = dataclasses.replace(context, views=dataclasses.replace(VIEWS, operations=OPERATIONS[:1]))
    with pytest.raises(FingerprintMismatch, match=r"views.operations: stored .*RandomHorizontalFlip.*wanted"):
        open_distillation([run / "store.zarr"], LOSSES, STUDENT, {}, other)
    more = dataclasses.replace(context, views=dataclasses.replace(VIEWS, num_views=4))
    with pytest.raises(RecipeError, match="has 3 views, the recipe needs 4"):
        open_distillation([run / "store.zarr"], LOSSES, STUDENT, {}, more)


def test_hint_with_an_unknown_store_is_an_error(run):
    hint = Hint(loss="hint", layers=(("stage2", "stage2"),), store=1)
    with pytest.raises(RecipeError, match="distill.0 .hint. uses store 1, but there are 1"):
        open_distillation([run / "store.zarr"], [hint], STUDENT, {}, tiny_context(run))


def test_student_sees_the_view_of_its_targets(run):
    """Epoch e uses view e mod V, for images and targets."""
    context = tiny_context(run)
    network = build_student(STUDENT, 0, context)
    spec = open_distillation([run / "store.zarr"], LOSSES, STUDENT, {}, context)
    task = build_task(network, spec, 0, context)
    store = open_store(run / "store.zarr")
    renderer = Renderer(VIEWS, 1, (8, 8))
    for epoch, view in ((0, 0), (2, 2), (3, 0), (7, 1)):
        at = task.order(5, epoch)[:20]
        ids = context.train_set.sample_ids[at]
        batch = next(task.stream(5, 20, epoch=epoch, step=0, epochs=epoch + 1))
        shown = renderer.render_batch(context.train_set.images[at], ids, view)
        assert torch.equal(batch.images.cpu(), network.normalize(shown))
        assert torch.equal(batch.teachers[0].logits, stored_rows(store, "logits", view, ids))
