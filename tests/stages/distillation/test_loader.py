"""The loader gives a user's own loop the batches of kdpipe's own training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from support.device import DEVICE
from support.tiny_run import (
    CACHE,
    LAYERS,
    STUDENT,
    TEACHER,
    VIEWS,
    make_tiny_store,
    open_tiny_spec,
    squares,
    stored_rows,
    subset,
    tiny_context,
)

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.data.decode import with_size
from kdpipe.stages.data.loader.image_loader import ViewRequest
from kdpipe.stages.distillation.loader import DistillationLoader, StudentBatch
from kdpipe.stages.distillation.task_builder import build_student, build_task
from kdpipe.stages.errors import DataError, RecipeError
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.reader import TargetLoadingConfig
from kdpipe.stages.teacher import load_teacher
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.mix import MixConfig
from kdpipe.stages.views.renderer import Renderer
from kdpipe.store import FingerprintMismatch, StoreError, open_store

TRAIN = squares(300, 0)
ENGINES = {
    "tensor": VIEWS,
    "mixed": dataclasses.replace(VIEWS, mix=MixConfig(mixup_alpha=0.4, cutmix_alpha=1.0, p=0.8)),
    "transforms": Views(
        3, [{"name": "RandomCrop", "size": [8, 8], "padding": 1}], engine="transforms", mix=MixConfig(cutmix_alpha=1.0)
    ),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A store of each engine's views, one with top-k logits, one that began with 200 samples; and their contexts."""
    folder = tmp_path_factory.mktemp("loader")
    contexts = {
        name: tiny_context(folder / name, views=views, train_set=subset(TRAIN, 120) if name == "transforms" else TRAIN)
        for name, views in ENGINES.items()
    }
    for context in contexts.values():
        make_tiny_store(context)
    teacher = load_teacher(TEACHER, 0, contexts["tensor"])
    for name, config, layers in (("top", dataclasses.replace(CACHE, top_k=2), []), ("grown", CACHE, LAYERS)):
        cache_teacher(config, folder / f"{name}.zarr", teacher, layers, contexts["tensor"])
    first = dataclasses.replace(contexts["mixed"], train_set=subset(TRAIN, 200))
    for context in (first, dataclasses.replace(first, train_set=TRAIN, mix_partners=first.train_set)):
        cache_teacher(CACHE, folder / "mixed-grown.zarr", load_teacher(TEACHER, 0, contexts["mixed"]), LAYERS, context)
    return folder, contexts


def loader_of(stores, name="tensor", **arguments):
    folder, contexts = stores
    arguments = {"batch_size": 32, "seed": 7, "num_workers": 0, "device": DEVICE} | arguments
    return DistillationLoader(folder / name / "store.zarr", contexts[name].train_set, **arguments)


def pixels_of(batch):
    """Return the images of a batch that was not scaled."""
    return batch.images.round().to(torch.uint8).cpu()


def numbers(batches):
    return [{key: batch[key] for key in ("images", "labels", "teacher_logits", "sample_ids")} for batch in batches]


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(one[key], other[key]) for one, other in zip(first, second, strict=True) for key in one
    )


@pytest.mark.parametrize("name", ENGINES)
def test_batches_are_those_of_kdpipes_own_training(stores, name):
    folder, contexts = stores
    spec = open_tiny_spec(folder / name / "store.zarr", contexts[name])
    task = build_task(build_student(STUDENT, 0, contexts[name]), spec, 7, contexts[name])
    own = list(task.stream(7, 32, epoch=0, step=0, epochs=4))
    loader = loader_of(stores, name)
    given = [batch for _ in range(4) for batch in loader]
    assert len(given) == len(own) == 4 * len(loader)
    for batch, expected in zip(given, own, strict=True):
        (teacher,) = expected.teachers
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.teacher_logits, teacher.logits_at(1.0))
        assert torch.equal(batch.features["stage2"], teacher.features[FeatureSpec("stage2")])
        assert torch.equal(
            torch.sort(task.loader.dataset.sample_ids).values[expected.ranks.cpu()], batch.sample_ids.cpu()
        )
        logits = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        assert torch.allclose(F.cross_entropy(logits, batch.labels), expected.hard.losses(logits).mean())


def test_images_are_the_views_that_the_teacher_saw(stores):
    loader = loader_of(stores, normalize=([0.0], [1 / 255]))
    position = {int(number): index for index, number in enumerate(TRAIN.sample_ids)}
    stored = open_store(stores[0] / "tensor" / "store.zarr")
    for epoch in range(4):
        batch = next(iter(loader))
        ids, view = batch.sample_ids.cpu(), epoch % 3
        rows = torch.tensor([position[int(number)] for number in ids])
        rendered = Renderer(VIEWS, 1, (8, 8)).render_batch(TRAIN.images[rows], ids, view)
        assert torch.equal(pixels_of(batch), rendered)
        assert torch.equal(batch.labels.cpu(), TRAIN.labels[rows])
        assert torch.equal(batch.teacher_logits, stored_rows(stored, "logits", view, ids))


def test_views_are_resized_for_a_smaller_student(stores):
    small, large = (loader_of(stores, "mixed", normalize=([0.0], [1 / 255]), image_size=side) for side in (6, None))
    for batch, whole in zip(small, large, strict=True):
        pixels = with_size(pixels_of(whole).numpy(), 6, "test")
        assert torch.equal(pixels_of(batch), torch.from_numpy(pixels))
        assert torch.equal(batch.teacher_logits, whole.teacher_logits)


def test_labels_of_mixed_views_are_probabilities(stores):
    labels = next(iter(loader_of(stores, "mixed"))).labels.cpu()
    assert labels.shape == (32, 4)
    assert torch.allclose(labels.sum(1), torch.ones(32))
    assert 0 < int((labels.max(1).values < 1).sum()) < 32


def test_mixed_views_of_a_store_that_has_grown(stores):
    folder, contexts = stores
    grown = folder / "mixed-grown.zarr"
    few = TRAIN.take(torch.arange(180, 280))
    with pytest.raises(DataError, match="mixes images with samples that data set squares lacks"):
        DistillationLoader(grown, few, num_workers=0)
    whole = {int(number): index for index, number in enumerate(TRAIN.sample_ids)}
    context = dataclasses.replace(contexts["mixed"], mix_partners=subset(TRAIN, 200))
    batch = next(iter(DistillationLoader(grown, few, batch_size=50, mix_partners=TRAIN, normalize=([0.0], [1 / 255]))))
    assert batch.images.shape == (50, 1, 8, 8)
    rows = torch.tensor([whole[int(number)] for number in batch.sample_ids])
    loaded = context.train_loader.get(ViewRequest(rows, view=0))
    assert torch.equal(pixels_of(batch), loaded.images.cpu())


@pytest.mark.parametrize("name", ["tensor", "transforms"])
def test_processes_share_the_batches_of_one(stores, name):
    whole = list(loader_of(stores, name))
    parts = [list(loader_of(stores, name, rank=rank, num_replicas=2)) for rank in range(2)]
    joined = [
        {key: torch.cat([first[key], second[key]]) for key in first}
        for first, second in zip(*map(numbers, parts), strict=True)
    ]
    assert equal(numbers(whole), joined)


def test_rank_and_count_are_those_of_torch_distributed(stores, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    launched = numbers(loader_of(stores))
    assert equal(launched, numbers(loader_of(stores, rank=1, num_replicas=2)))


@pytest.mark.parametrize("name", ENGINES)
def test_a_resumed_loader_continues_with_the_next_batch(stores, name):
    straight = loader_of(stores, name)
    expected = [*straight, *straight, *straight]
    first = loader_of(stores, name)
    steps = len(first)
    seen = list(first)
    for batch in first:
        seen.append(batch)
        if len(seen) == steps + 2:
            break
    state = first.state_dict()
    assert state == {"seed": 7, "epoch": 1, "step": 2}
    second = loader_of(stores, name)
    second.load_state_dict(state)
    for epoch in range(state["epoch"], 3):
        second.set_epoch(epoch)
        seen.extend(second)
    assert equal(numbers(seen), numbers(expected))
    assert second.state_dict() == {"seed": 7, "epoch": 3, "step": 0}


@pytest.mark.parametrize("name", ["tensor", "transforms"])
def test_an_epoch_that_was_left_is_followed_by_the_next(stores, name):
    loader, straight = loader_of(stores, name, num_workers=1), loader_of(stores, name)
    epochs = [numbers(straight) for _ in range(3)]
    left = iter(loader)
    next(left)
    left.close()
    assert equal(numbers(loader), epochs[1])
    loader.set_epoch(0)
    assert equal(numbers(loader), epochs[0])
    loader.set_epoch(2)
    assert equal(numbers(loader), epochs[2])


def test_a_new_iteration_ends_the_last(stores):
    loader = loader_of(stores)
    first, second, _ = iter(loader), iter(loader), iter(loader)
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="another iteration of the same loader was started"):
        next(first)
    assert loader.state_dict() == {"seed": 7, "epoch": 1, "step": 1}


def test_streamed_targets_come_in_the_engines_order(stores):
    streamed = TargetLoadingConfig(memory_bytes=1, mapped_bytes=0)
    folder, contexts = stores
    spec = dataclasses.replace(
        open_tiny_spec(folder / "tensor/store.zarr", contexts["tensor"]), target_loading=streamed
    )
    task = build_task(build_student(STUDENT, 0, contexts["tensor"]), spec, 7, contexts["tensor"])
    own = list(task.stream(7, 32, epoch=0, step=0, epochs=1))
    given = list(loader_of(stores, target_loading=streamed))
    assert all(torch.equal(a.images, b.images) for a, b in zip(own, given, strict=True))
    assert all(torch.equal(a.teachers[0].logits, b.teacher_logits) for a, b in zip(own, given, strict=True))


def test_top_k_logits_are_dense_at_the_chosen_temperature(stores):
    path = stores[0] / "top.zarr"
    warm = next(iter(DistillationLoader(path, TRAIN, temperature=4)))
    cool = next(iter(DistillationLoader(path, TRAIN)))
    dense = next(iter(DistillationLoader(stores[0] / "grown.zarr", TRAIN)))
    assert torch.equal(warm.sample_ids, dense.sample_ids)
    assert warm.features == {}
    for batch, temperature in ((cool, 1), (warm, 4)):
        assert torch.equal(batch.teacher_logits, batch.teacher.logits_at(temperature))
        tail = 1 - (batch.teacher_logits / temperature).softmax(1).topk(2).values.sum(1)
        exact = 1 - (dense.teacher_logits / temperature).softmax(1).topk(2).values.sum(1)
        assert torch.allclose(tail, exact, atol=2e-3)
    with pytest.raises(StoreError, match="temperature"):
        DistillationLoader(path, TRAIN, temperature=50)


def test_features_are_those_asked_for(stores):
    assert set(next(iter(loader_of(stores))).features) == {"stage2"}
    assert next(iter(loader_of(stores, features=[]))).features == {}
    batch = next(iter(loader_of(stores, features=["stage2:pooled"])))
    assert torch.allclose(batch.features["stage2:pooled"], batch.teacher.features[FeatureSpec("stage2", "pooled")])
    assert batch.features["stage2:pooled"].shape == (32, 16)


def test_a_plain_loop_learns(stores):
    loader = loader_of(stores, seed=0)
    student = build_student(STUDENT, 0, stores[1]["tensor"]).model.to(DEVICE)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(4):
        for batch in loader:
            loss = F.kl_div(
                student(batch.images).log_softmax(1), batch.teacher_logits.softmax(1), reduction="batchmean"
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-9:]) < 0.5 * sum(losses[:9])


def moved_as_by_accelerate(value):
    """Rebuild containers by their type around moved tensors, as `accelerate.utils.recursively_apply` and Lightning."""
    if isinstance(value, Mapping):
        return type(value)({key: moved_as_by_accelerate(each) for key, each in value.items()})
    return value.to("meta")


def test_a_batch_is_moved_as_a_dict_of_tensors(stores):
    batch = next(iter(loader_of(stores)))
    rebuilt, moved = moved_as_by_accelerate(batch), batch.to("meta")
    assert list(batch) == ["images", "labels", "teacher_logits", "features", "sample_ids"]
    for other in (rebuilt, moved):
        assert isinstance(other, StudentBatch)
        assert other.images.is_meta
        assert other["features"]["stage2"].is_meta
    assert moved.teacher.logits_at(1.0).is_meta
    with pytest.raises(AttributeError, match=r"no 'teacher', only images, labels"):
        _ = rebuilt.teacher
    assert next(iter(DistillationLoader(stores[0] / "top.zarr", TRAIN))).to("meta").teacher.values.is_meta


def test_a_torch_dataset_has_the_same_batches(stores):
    pairs = list(zip(TRAIN.images.unbind(), TRAIN.labels.tolist(), strict=True))
    context = stores[1]["tensor"]
    by_index = dataclasses.replace(TRAIN, sample_ids=torch.arange(300))
    path = stores[0] / "by-index.zarr"
    teacher = load_teacher(TEACHER, 0, context)
    cache_teacher(CACHE, path, teacher, LAYERS, dataclasses.replace(context, train_set=by_index))

    class Pairs(torch.utils.data.Dataset):
        classes = TRAIN.class_names

        def __len__(self):
            return len(pairs)

        def __getitem__(self, index):
            return pairs[index]

    own = DistillationLoader(path, Pairs())
    assert equal(numbers(own), numbers(DistillationLoader(path, by_index)))
    assert torch.equal(own.normalize(TRAIN.images), DistillationLoader(path, by_index).normalize(TRAIN.images))


def test_other_data_and_bad_arguments_are_refused(stores):
    other = dataclasses.replace(TRAIN, images=TRAIN.images ^ 1)
    path = stores[0] / "tensor" / "store.zarr"
    with pytest.raises(FingerprintMismatch, match="pixel checksum of sample"):
        DistillationLoader(path, other)
    with pytest.raises(StoreError, match="no targets for 300 of the 300 samples"):
        DistillationLoader(path, dataclasses.replace(TRAIN, sample_ids=TRAIN.sample_ids + 10**6))
    for arguments, sentence in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 33, "rank": 0, "num_replicas": 2}, "batch_size is 33"),
        ({"rank": 2, "num_replicas": 2}, "rank is 2"),
        ({"rank": 0}, "rank and num_replicas must be given together"),
        ({"features": ["stage2:nothing"]}, "features has 'stage2:nothing'"),
        ({"normalize": ([0.5] * 3, [1.0] * 3)}, "do not fit images of 1 channels"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            loader_of(stores, **arguments)
    with pytest.raises(StoreError, match="has no features of 'stage1'"):
        loader_of(stores, features=["stage1"])


def test_a_state_of_another_loader_is_refused(stores):
    loader = loader_of(stores)
    for state in ({"seed": 8, "epoch": 0, "step": 0}, {"seed": 7, "epoch": 0, "step": 10}):
        with pytest.raises(RecipeError, match=r"the loader's state is of seed .*, epoch 0, step"):
            loader.load_state_dict(state)


def test_labels_that_are_not_mixed_are_whole_numbers(stores):
    assert next(iter(loader_of(stores))).labels.dtype == torch.int64


def test_kinds_of_views_are_rows_of_a_batch_one_after_the_other(stores, tmp_path):
    """Each row has the label and the targets of its own view, also where logits are encoded."""
    views = Views(2, kinds={"weak": ["RandomHorizontalFlip"], "strong": [{"name": "RandomCrop", "padding": 2}]})
    context = tiny_context(tmp_path, views=views, train_set=subset(TRAIN, 100))
    teacher = load_teacher(TEACHER, 0, stores[1]["tensor"])
    cache_teacher(dataclasses.replace(CACHE, top_k=2), tmp_path / "top.zarr", teacher, LAYERS, context)
    store = open_store(tmp_path / "top.zarr")
    loader = DistillationLoader(store, context.train_set, batch_size=40, seed=7, normalize=(0.0, 1 / 255))
    loader.set_epoch(1)
    batch = next(iter(loader))
    assert loader.views.num_views == 2
    assert len(batch.images) == len(batch.labels) == len(batch.teacher_logits) == 80
    renderer, sources = Renderer(views, 1, (8, 8)), context.train_set
    for kind, (ids, pixels) in enumerate(zip(batch.sample_ids.chunk(2), pixels_of(batch).chunk(2), strict=True)):
        at = torch.tensor([sources.sample_ids.tolist().index(one) for one in ids.tolist()])
        assert torch.equal(pixels, renderer.render_batch(sources.images[at], ids.cpu(), 2 + kind))
        rows = slice(40 * kind, 40 * kind + 40)
        assert torch.equal(batch.labels[rows].cpu(), sources.labels[at])
        stored = stored_rows(store, "features/stage2", 2 + kind, ids.cpu())
        assert torch.equal(batch.features["stage2"][rows], stored)
        decoded = torch.from_numpy(store.logits(2 + kind, ids.cpu().numpy()))
        assert torch.allclose(batch.teacher_logits[rows].cpu(), decoded, atol=1e-5)
