"""The images that networks see: the same from any source, renderer and resumed job."""

import itertools
import multiprocessing
import os

import pytest
import torch
from support.device import DEVICE
from support.photographs import UNEQUAL, in_memory, photographs
from support.reference_rendering import (
    CROPS,
    MIXED_ANY,
    MIXED_CROPS,
    NUM_SAMPLES,
    SCALING,
    VIEWS,
    check_labels,
    expected,
    loader_of,
    make_task,
    mixture_of,
    shuffled,
)

from kdpipe.stages.data.loader.image_loader import ImageLoader, ViewRequest
from kdpipe.stages.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("equal"), NUM_SAMPLES)


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("unequal"), NUM_SAMPLES, UNEQUAL)


def splits():
    """The samples in several orders, split into batches of several sizes, in several views."""
    cases = ((0, 7, 0), (1, 13, 2), (2, 26, 0), (3, 5, -1))
    return [ViewRequest(indices, view) for seed, size, view in cases for indices in shuffled(seed).split(size)]


@pytest.mark.parametrize("name", VIEWS)
def test_images_do_not_depend_on_workers_or_batch_size(equal, unequal, name):
    views = VIEWS[name]
    image_set = equal if views.engine == "tensor" else unequal
    truth = {view: expected(image_set, views, torch.arange(NUM_SAMPLES), view) for view in (0, 2, -1)}
    assert not torch.equal(truth[0], truth[2]), "views differ, else the test would see nothing"
    everywhere = [loader_of(image_set, views, num_workers) for num_workers in (0, 1, 3)]
    if views.engine == "tensor":
        everywhere.append(loader_of(in_memory(image_set), views, 2))
    for loader in everywhere:
        batches = list(loader.stream(splits()))
        assert len(batches) == len(splits())
        for request, batch in zip(splits(), batches, strict=True):
            assert torch.equal(batch.indices, request.indices)
            assert torch.equal(batch.images, truth[request.view][request.indices])


def test_transforms_of_images_in_memory_run_in_workers(equal):
    indices = shuffled(0)
    batch = loader_of(in_memory(equal), MIXED_ANY, 2).get(ViewRequest(indices, 1))
    assert torch.equal(batch.images, expected(equal, MIXED_ANY, indices, 1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_original_images_are_loaded_without_a_view(equal, num_workers):
    indices = shuffled(1)
    raw = in_memory(equal).images[indices].to(DEVICE)
    for loader in (ImageLoader(equal, DEVICE, num_workers=num_workers), loader_of(equal, MIXED_CROPS, num_workers)):
        batch = loader.get(ViewRequest(indices))
        assert torch.equal(batch.images, raw)
        assert batch.mixture is None


def test_images_that_stay_on_the_host_are_the_same(equal, monkeypatch):
    image_set, request = in_memory(equal), ViewRequest(shuffled(1)[:7], 2)
    wanted = loader_of(image_set, MIXED_CROPS, 0).get(request).images
    monkeypatch.setattr("kdpipe.stages.data.loader.image_loader._to_device_if_fits", lambda images, *rest: images)
    assert torch.equal(loader_of(image_set, MIXED_CROPS, 0).get(request).images, wanted)


def test_original_images_of_different_sizes_are_rejected(unequal):
    with pytest.raises(
        DataError, match=r"have different sizes: .*0\.png is 10 x 12, .*1\.png is 14 x 9: set data\.image_size"
    ):
        ImageLoader(unequal, DEVICE, num_workers=0).get(ViewRequest(torch.arange(4)))


def test_partners_can_come_from_a_larger_data_set(equal):
    part, indices = equal.take(torch.tensor([20, 3, 11, 8])), torch.tensor([2, 0, 3, 1])
    truth = expected(part, MIXED_CROPS, indices, 1, equal)
    outside = set(mixture_of(part, MIXED_CROPS, indices, 1, equal).partner_ids.tolist()) - set(part.sample_ids.tolist())
    assert outside, "else the test would see nothing"
    for own, partners in itertools.product((part, in_memory(part)), (equal, in_memory(equal))):
        loader = loader_of(own, MIXED_CROPS, 0, mix_partners=partners)
        assert torch.equal(loader.get(ViewRequest(indices, 1)).images, truth)
        assert loader.partner_labels(equal.sample_ids[indices]).tolist() == equal.labels[indices].tolist()


@pytest.mark.parametrize(("num_workers", "started"), [(0, 0), (2, 2), (None, len(os.sched_getaffinity(0)))])
def test_num_workers_are_started(equal, num_workers, started):
    before = set(multiprocessing.active_children())
    loader = loader_of(equal, CROPS, num_workers)
    loader.get(ViewRequest(torch.arange(4), 0))
    loader.get(ViewRequest(torch.arange(4), 1))
    assert len(set(multiprocessing.active_children()) - before) == started


def test_images_in_memory_need_no_workers(equal):
    before = set(multiprocessing.active_children())
    loader = loader_of(in_memory(equal), CROPS, 2)
    loader.get(ViewRequest(torch.arange(4), 0))
    assert set(multiprocessing.active_children()) == before


def same(left, right):
    fields = ("labels", "partner_labels", "own_share")
    equal_labels = all(torch.equal(getattr(left.hard, field), getattr(right.hard, field)) for field in fields)
    return torch.equal(left.images, right.images) and equal_labels


@pytest.mark.parametrize("fresh_views", [False, True])
def test_task_resumed_mid_epoch_yields_the_same_batches(equal, fresh_views):
    ahead = make_task(loader_of(equal, MIXED_CROPS, 2), fresh_views=fresh_views)
    here = make_task(loader_of(in_memory(equal), MIXED_CROPS, 0), fresh_views=fresh_views)
    undisturbed = list(here.stream(3, 8, epoch=0, step=0, epochs=3))
    assert len(undisturbed) == 9, "3 epochs of 3 full batches"
    assert not any(same(undisturbed[0], other) for other in undisturbed[1:])
    for epoch, step in ((0, 0), (1, 2), (0, 1), (2, 0)):
        batches = ahead.stream(3, 8, epoch=epoch, step=step, epochs=3)
        expected_batches = undisturbed[3 * epoch + step :]
        for batch, other in zip(list(batches), expected_batches, strict=True):
            assert same(batch, other)
        left = ahead.stream(3, 8, epoch=epoch, step=step, epochs=3)  # halfway: the next one does not notice
        assert same(next(left), expected_batches[0])


def test_epochs_use_stored_or_fresh_views(equal):
    loader = loader_of(in_memory(equal), CROPS, 0)
    for fresh_views, views in ((False, (0, 1, 0, 1)), (True, (-1, -2, -3, -4))):
        task = make_task(loader, fresh_views=fresh_views)
        for epoch, view in enumerate(views):
            batch = next(task.stream(0, 8, epoch=epoch, step=0, epochs=epoch + 1))
            indices = task.order(0, epoch)[:8]
            assert torch.equal(batch.images, SCALING(expected(equal, CROPS, indices, view)))


class RecordedTargets:
    """Targets that equal the request."""

    slabs = None

    def target_masks(self, indices):
        return ()

    def batch(self, view, indices):
        return view, indices.tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_targets_match_images_that_are_loaded_ahead(equal, num_workers):
    task = make_task(loader_of(equal, CROPS, num_workers), targets=RecordedTargets())
    batches = task.stream(3, 8, epoch=1, step=2, epochs=4)
    steps = [(1, 2), *((epoch, step) for epoch in (2, 3) for step in range(3))]
    for (epoch, step), batch in zip(steps, batches, strict=True):
        indices = task.order(3, epoch)[8 * step : 8 * step + 8]
        assert batch.teachers == [epoch % 2, indices.tolist()]
        assert torch.equal(batch.images, SCALING(expected(equal, CROPS, indices, epoch % 2)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mixture_has_the_labels_of_both_by_their_shares(equal, num_workers):
    task = make_task(loader_of(equal, MIXED_CROPS, num_workers))
    for epoch, batch in enumerate(task.stream(1, 20, epoch=0, step=0, epochs=2)):
        check_labels(equal, task.order(1, epoch)[:20], epoch, batch)
