"""MixUp and CutMix stored targets belong to the mixture that the student sees."""

import dataclasses

import numpy as np
import pytest
import torch
from support.device import DEVICE
from support.made_store import folder_bytes
from support.tiny_run import (
    CACHE,
    LAYERS,
    LOSSES,
    STUDENT,
    TEACHER,
    VIEWS,
    make_tiny_store,
    squares,
    stored_rows,
    tiny_context,
)

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.data.loader.mix_partners import load_partner_pool, read_partner_pool
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.task_builder import build_student, build_task
from kdpipe.stages.errors import DataError
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.teacher import load_teacher
from kdpipe.stages.views.mix import MixConfig, sample_mix
from kdpipe.stages.views.renderer import Renderer
from kdpipe.stages.views.rng import CounterRNG
from kdpipe.stages.views.tensor_engine import MIX_STREAM
from kdpipe.store import FingerprintMismatch, open_store, read_store_manifest

MIX = MixConfig(mixup_alpha=0.4, cutmix_alpha=1.0, p=0.8)
MIXED = dataclasses.replace(VIEWS, mix=MIX)
ALL = squares(120, 0)
FIRST, FEW = ALL.take(torch.arange(80)), ALL.take(torch.tensor([90, 3, 41, 117, 8, 5, 60, 61]))


def mixed_context(run, train_set=ALL, **changes):
    return tiny_context(run, train_set=train_set, views=MIXED, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A store of all samples, and one that began with the first of them."""
    folder = tmp_path_factory.mktemp("mixed")
    make_tiny_store(mixed_context(folder))
    first = mixed_context(folder, FIRST)
    cache_teacher(CACHE, folder / "first.zarr", load_teacher(TEACHER, 0, first), LAYERS, first)
    return folder


def mixtures(ids, view, partner_pool):
    """With whom each sample is mixed, and how."""
    return sample_mix(MIX, CounterRNG(MIXED.seed, view, ids, MIX_STREAM), torch.sort(partner_pool).values, (8, 8))


def render_mixed(ids, view, partner_pool):
    """The mixed images of samples, uint8 [B, 1, 8, 8], each made by itself, pixel by pixel, from raw images."""
    mixture, plain = mixtures(ids, view, partner_pool), Renderer(VIEWS, 1, (8, 8))
    image_of = dict(zip(ALL.sample_ids.tolist(), ALL.images, strict=True))
    mixed = []
    for index, pair in enumerate(zip(ids.tolist(), mixture.partner_ids.tolist(), strict=True)):
        own, partner = (plain.render_batch(image_of[key][None], torch.tensor([key]), view)[0].long() for key in pair)
        weight = int(mixture.weights[index])
        image = (own * weight + partner * (2**16 - weight) + 2**15) // 2**16
        top, left, height, width = (int(side[index]) for side in mixture.boxes)
        image[:, top : top + height, left : left + width] = partner[:, top : top + height, left : left + width]
        mixed.append(image.to(torch.uint8))
    return torch.stack(mixed)


def predict(teacher, images):
    with torch.no_grad():
        return teacher.model.to(DEVICE)(teacher.normalize(images.to(DEVICE))).cpu().numpy()


def make_task(path, context):
    network = build_student(STUDENT, 0, context)
    return network, build_task(network, open_distillation([path], LOSSES, STUDENT, {}, context), 0, context)


@pytest.mark.parametrize("view", range(VIEWS.num_views))
def test_stored_logits_are_those_of_the_mixture(run, view):
    teacher, ids = load_teacher(TEACHER, 0, mixed_context(run)), ALL.sample_ids
    stored = open_store(run / "store.zarr").gather("logits", view, ids.numpy())
    exact = predict(teacher, render_mixed(ids, view, ids))
    np.testing.assert_allclose(stored, exact, rtol=2e-3, atol=2e-3)
    unmixed = predict(teacher, Renderer(VIEWS, 1, (8, 8)).render_batch(ALL.images, ids, view))
    assert (np.abs(unmixed - exact).max(1) > 0.01).mean() > 0.5, "else the test would see nothing"


def test_student_gets_the_stored_mixture_and_both_labels(run):
    context = mixed_context(run)
    network, task = make_task(run / "store.zarr", context)
    label_of = dict(zip(ALL.sample_ids.tolist(), ALL.labels.tolist(), strict=True))
    for epoch, view in ((0, 0), (4, 1)):
        batch = next(task.stream(5, 50, epoch=epoch, step=0, epochs=epoch + 1))
        ids = ALL.sample_ids[task.order(5, epoch)[:50]]
        mixture = mixtures(ids, view, ALL.sample_ids)
        assert torch.equal(batch.images.cpu(), network.normalize(render_mixed(ids, view, ALL.sample_ids)))
        assert batch.hard.labels.tolist() == [label_of[sample_id] for sample_id in ids.tolist()]
        assert batch.hard.partner_labels.tolist() == [label_of[sample_id] for sample_id in mixture.partner_ids.tolist()]
        assert torch.equal(batch.hard.own_share.cpu(), mixture.own_share)
        stored = stored_rows(open_store(run / "store.zarr"), "logits", view, ids)
        assert torch.equal(batch.teachers[0].logits, stored)


def test_the_hard_labels_of_a_mixture_count_by_their_shares(run):
    _, task = make_task(run / "store.zarr", mixed_context(run))
    task.distillation.to(DEVICE)
    batch = next(task.stream(5, 50, epoch=0, step=0, epochs=1))
    outputs = ModelOutput(torch.randn(50, 4, device=DEVICE), {"stage2": torch.randn(50, 8, 4, 4, device=DEVICE)})
    logs, total = outputs.logits.log_softmax(1), 0.0
    for index in range(50):
        own, share = int(batch.hard.labels[index]), float(batch.hard.own_share[index])
        partner = int(batch.hard.partner_labels[index])
        total -= share * float(logs[index, own]) + (1 - share) * float(logs[index, partner])
    assert float(task.losses(outputs, batch)["hard_labels"]) == pytest.approx(0.1 * total / 50, rel=1e-5)


def test_extended_store_keeps_its_partners(run, tmp_path):
    path = tmp_path / "grown.zarr"
    few = mixed_context(run, FIRST)
    cache_teacher(CACHE, path, load_teacher(TEACHER, 0, few), LAYERS, few)
    began = {name: raw for name, raw in folder_bytes(path).items() if "/c/" in name and "samples" not in name}
    partners = load_partner_pool(read_partner_pool(path), ALL, path)
    grown = mixed_context(run, ALL, mix_partners=partners)
    teacher = load_teacher(TEACHER, 0, grown)
    assert cache_teacher(CACHE, path, teacher, LAYERS, grown)["num_samples"] == 120
    after = folder_bytes(path)
    assert began
    assert all(after[name] == raw for name, raw in began.items())
    assert np.array_equal(read_partner_pool(path).ids, torch.sort(FIRST.sample_ids).values)
    for view in range(VIEWS.num_views):
        stored = open_store(path).gather("logits", view, ALL.sample_ids.numpy())
        exact = predict(teacher, render_mixed(ALL.sample_ids, view, FIRST.sample_ids))
        np.testing.assert_allclose(stored, exact, rtol=2e-3, atol=2e-3)
    new = ALL.sample_ids[80:]
    mixture = mixtures(new, 0, FIRST.sample_ids)
    assert set(mixture.partner_ids[mixture.mixed].tolist()) <= set(FIRST.sample_ids.tolist())
    assert set(mixtures(new, 0, ALL.sample_ids).partner_ids.tolist()) & set(new.tolist()), "it matters who may be drawn"


def test_growing_with_other_partners_is_refused(run):
    context, path = mixed_context(run), run / "first.zarr"
    teacher = load_teacher(TEACHER, 0, context)
    with pytest.raises(FingerprintMismatch, match=r"views\.mix\.num_partners: stored 80, wanted 120"):
        cache_teacher(CACHE, path, teacher, LAYERS, context)
    assert read_store_manifest(path).layout.num_samples == 80


PARTS = {
    "num_train": FEW,
    "classes": ALL.take((ALL.labels == 2).nonzero()[:, 0]),
    "reordered": ALL.take(torch.arange(119, -1, -1)),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_student_on_a_subset_gets_the_same_mixtures(run, part):
    path = run / "store.zarr"
    partners = load_partner_pool(read_partner_pool(path), ALL, path)
    context = mixed_context(run, part, mix_partners=partners)
    network, task = make_task(path, context)
    size = part.num_samples
    batch = next(task.stream(1, size, epoch=2, step=0, epochs=3))
    ids = part.sample_ids[task.order(1, 2)]
    assert torch.equal(batch.images.cpu(), network.normalize(render_mixed(ids, 2, ALL.sample_ids)))
    mixture = mixtures(ids, 2, ALL.sample_ids)
    label_of = dict(zip(ALL.sample_ids.tolist(), ALL.labels.tolist(), strict=True))
    assert batch.hard.partner_labels.tolist() == [label_of[sample_id] for sample_id in mixture.partner_ids.tolist()]


def test_student_with_another_partner_pool_is_rejected(run):
    context = mixed_context(run, FEW)
    with pytest.raises(FingerprintMismatch, match=r"views\.mix\.num_partners: stored 120, wanted 8"):
        open_distillation([run / "store.zarr"], LOSSES, STUDENT, {}, context)


def test_partners_are_found_by_id_in_any_order(run):
    path = run / "first.zarr"
    found = load_partner_pool(read_partner_pool(path), PARTS["reordered"], path)
    assert found.sample_ids.tolist() == sorted(FIRST.sample_ids.tolist())
    image_of = dict(zip(ALL.sample_ids.tolist(), ALL.images, strict=True))
    assert torch.equal(found.images, torch.stack([image_of[sample_id] for sample_id in found.sample_ids.tolist()]))


@pytest.mark.parametrize("absent", [[0], [7, 8, 9, 10], range(80)])
def test_missing_partners_are_reported_by_count_and_ids(run, absent):
    path = run / "first.zarr"
    left = ALL.take(torch.tensor([index for index in range(120) if index not in absent]))
    named = sorted(FIRST.sample_ids[list(absent)].tolist())[:3]
    with pytest.raises(DataError) as raised:
        load_partner_pool(read_partner_pool(path), left, path)
    assert f"lacks: {len(absent)} of 80, such as {named}: restore the images" in str(raised.value)


@pytest.mark.parametrize("change", ["label", "pixel checksum"])
def test_changed_partner_is_rejected_by_its_id(run, change):
    """It stands in other samples' images, and the student may have none of its own to notice by."""
    path, index = run / "first.zarr", 3
    if change == "label":
        other = dataclasses.replace(ALL, labels=(ALL.labels + (torch.arange(120) == index)) % 4)
    else:
        images = ALL.images.clone()
        images[index, 0, 0, 0] ^= 1
        other = dataclasses.replace(ALL, images=images)
    with pytest.raises(
        FingerprintMismatch, match=rf"{change} of partner {int(ALL.sample_ids[index])}: stored .*1 of the 80"
    ):
        load_partner_pool(read_partner_pool(path), other, path)
