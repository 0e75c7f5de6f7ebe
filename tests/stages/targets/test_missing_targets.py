"""Data sets and stores with different samples: rows join by id, and samples without targets use their labels."""

import dataclasses
import itertools
import json

import pytest
import torch
from support.device import DEVICE
from support.tiny_run import (
    CACHE,
    LAYERS,
    LOSSES,
    STUDENT,
    TEACHER,
    make_tiny_store,
    squares,
    stored_rows,
    tiny_context,
)

from kdpipe.pipeline.steps import cache_teacher, train_student, train_teacher
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import student_folder
from kdpipe.stages.distillation.task_builder import build_student, build_task
from kdpipe.stages.losses.logits.kd import kd_loss
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.targets.join import join
from kdpipe.stages.targets.reader import TargetLoadingConfig, Targets
from kdpipe.stages.teacher import load_teacher
from kdpipe.store import FingerprintMismatch, StoreError, open_store

pytestmark = pytest.mark.usefixtures("without_onnx")

ALL = squares(120, 0)
KNOWN = 80
STORED = ALL.take(torch.arange(KNOWN))
LENIENT = dataclasses.replace(STUDENT, missing_targets="hard-labels")
ARRAYS = ("logits", "features/stage2")
READS = {
    "memory": TargetLoadingConfig(device_bytes=0),
    "mapped": TargetLoadingConfig(device_bytes=0, memory_bytes=0),
    "streamed": TargetLoadingConfig(memory_bytes=0, mapped_bytes=0),
    **({"device": TargetLoadingConfig()} if DEVICE.type == "cuda" else {}),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A store of the first samples, and a second teacher's of all."""
    folder = tmp_path_factory.mktemp("missing")
    make_tiny_store(tiny_context(folder, train_set=STORED))
    other = tiny_context(folder / "other", train_set=ALL)
    train_teacher(TEACHER, 1, other)
    cache_teacher(CACHE, folder / "whole.zarr", load_teacher(TEACHER, 1, other), LAYERS, other)
    return folder


def task_of(run, student, names=("store.zarr",), train_set=ALL):
    context = tiny_context(run, train_set=train_set)
    spec = open_distillation([run / name for name in names], LOSSES, student, {}, context)
    task = build_task(build_student(student, 0, context), spec, 0, context)
    task.distillation.to(DEVICE)
    return task


def first_batch(task, size, epoch=0):
    """A batch, and the ids of its samples."""
    batch = next(task.stream(3, size, epoch=epoch, step=0, epochs=epoch + 1))
    order = task.order(3, epoch)[:size]
    return batch, task.loader.dataset.sample_ids[order]


def student_outputs(size):
    """Return a student's outputs, with gradients."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(size, 4, generator=generator).to(DEVICE).requires_grad_()
    maps = torch.randn(size, 8, 4, 4, generator=generator).to(DEVICE).requires_grad_()
    return ModelOutput(logits, {"stage2": maps})


PARTS = {
    "a part": ALL.take(torch.tensor([70, 2, 33, 34, 9])),
    "reordered": STORED.take(torch.randperm(KNOWN, generator=torch.Generator().manual_seed(1))),
    "a class": STORED.take((STORED.labels == 1).nonzero()[:, 0]),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("missing", ["error", "hard-labels"])
def test_samples_are_joined_by_id(run, part, missing):
    student = dataclasses.replace(STUDENT, missing_targets=missing)
    batch, ids = first_batch(task_of(run, student, train_set=part), part.num_samples, epoch=1)
    expected = stored_rows(open_store(run / "store.zarr"), "logits", 1, ids)
    assert batch.has_targets is None
    assert sorted(ids.tolist()) == sorted(part.sample_ids.tolist())
    assert torch.equal(batch.teachers[0].logits, expected)


def test_order_of_the_data_set_does_not_change_the_student(run, tmp_path):
    bits = []
    for name, part in (("one", STORED), ("other", PARTS["reordered"])):
        context = tiny_context(tmp_path / name, train_set=part)
        spec = open_distillation([run / "store.zarr"], LOSSES, STUDENT, {}, context)
        train_student(STUDENT, 0, spec, context)
        bits.append(student_folder(context.run_dir, "distilled", 0).model.read_bytes())
    assert bits[0] == bits[1]


def test_missing_targets_error_has_count_and_examples(run):
    absent = ALL.sample_ids[KNOWN:][:3].tolist()
    with pytest.raises(StoreError) as raised:
        task_of(run, STUDENT)
    assert f"has no targets for 40 of the 120 samples, such as {absent}: " in str(raised.value)
    assert "student.missing_targets = 'hard-labels'" in str(raised.value)


def test_data_set_without_any_targets_is_always_an_error(run):
    with pytest.raises(StoreError, match="no targets for 40 of the 40 samples, .* made from another data set"):
        task_of(run, LENIENT, train_set=ALL.take(torch.arange(KNOWN, 120)))


@pytest.mark.parametrize("what", ["labels", "images"])
def test_known_samples_are_still_checked(run, what):
    changed = ALL.take(torch.arange(120))
    getattr(changed, what)[5] = (getattr(changed, what)[5] + 1) % 4
    with pytest.raises(FingerprintMismatch, match=rf"of sample {changed.sample_ids[5]}: stored"):
        task_of(run, LENIENT, train_set=changed)
    changed = ALL.take(torch.arange(120))
    getattr(changed, what)[100] = (getattr(changed, what)[100] + 1) % 4
    task_of(run, LENIENT, train_set=changed)  # the store does not have this sample


@pytest.mark.parametrize("read", READS)
def test_each_sample_contributes_only_its_own_loss(run, read):
    """By hand, sample by sample: with targets 0.1 CE + KD + hint, without them CE alone."""
    size = 24
    task = task_of(run, dataclasses.replace(LENIENT, target_loading=READS[read]))
    assert task.targets.residence == read
    task.distillation.eval()  # the adapter's statistics are then not of this batch
    batch, ids = first_batch(task, size, epoch=2)
    known = torch.isin(ids, STORED.sample_ids)
    assert 0 < known.sum() < size
    assert torch.equal(batch.has_targets, known)
    store, student = open_store(run / "store.zarr"), student_outputs(size)
    adapted = task.distillation.losses["hint_1"].loss.pairs[0].adapter(student.features["stage2"])
    total = torch.zeros((), device=DEVICE)
    for row in range(size):
        hard = -student.logits[row].log_softmax(0)[batch.hard.labels[row]]
        if not known[row]:
            total = total + hard
            continue
        logits, map_ = (stored_rows(store, name, 2, ids[row : row + 1])[0] for name in ARRAYS)
        log_p, log_q = (logits / 4).log_softmax(0), (student.logits[row] / 4).log_softmax(0)
        soft = 16 * (log_p.exp() * (log_p - log_q)).sum()
        total = total + 0.1 * hard + 0.9 * soft + (adapted[row] - map_).square().mean()
    losses = task.losses(student, batch)
    assert set(losses) == {"hard_labels", "kd_0", "hint_1"}
    found = torch.stack(list(losses.values())).sum()
    assert found.item() == pytest.approx(total.item() / size, rel=1e-5)
    inputs = (student.logits, student.features["stage2"])
    for grad, byhand in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(total / size, inputs), strict=True):
        torch.testing.assert_close(grad, byhand, rtol=1e-4, atol=1e-7)
        assert (grad.flatten(1).abs().sum(1) > 0).tolist() == (known.tolist() if grad.ndim == 4 else [True] * size)


@pytest.mark.parametrize("read", READS)
def test_batches_without_targets_use_labels_alone(run, read):
    task = task_of(run, dataclasses.replace(LENIENT, target_loading=READS[read]))
    batches = list(task.stream(3, 2, epoch=0, step=0, epochs=1))
    order = task.order(3, 0)
    known = torch.isin(ALL.sample_ids[order], STORED.sample_ids).split(2)
    assert {tuple(some.tolist()) for some in known} == set(itertools.product([True, False], repeat=2))
    for batch, some in zip(batches, known, strict=True):
        assert torch.equal(batch.has_targets, some)
        if some.sum() == 1:  # twice, for the norms of adapters, which changes no mean
            student = student_outputs(2)
            byhand = 0.5 * 0.9 * kd_loss(student.logits[some], batch.teachers[0].logits[some], 4.0).mean()
            assert task.losses(student, batch)["kd_0"].item() == pytest.approx(byhand.item(), rel=1e-5)
        if some.any():
            continue
        student = student_outputs(2)
        losses = task.losses(student, batch)
        assert float(losses["kd_0"]) == float(losses["hint_1"]) == 0
        byhand = torch.nn.functional.cross_entropy(student.logits, batch.hard.labels)
        assert losses["hard_labels"].item() == pytest.approx(byhand.item(), rel=1e-6)
        torch.stack(list(losses.values())).sum().backward()
        assert student.logits.grad.abs().sum() > 0


def test_two_stores_each_cover_their_samples(run):
    """By hand, sample by sample: the mean of the logits of the teachers that have the sample."""
    task = task_of(run, LENIENT, ("whole.zarr", "store.zarr"))
    batch, ids = first_batch(task, 60)
    known = torch.isin(ids, STORED.sample_ids)
    assert 0 < known.sum() < 60
    assert batch.has_targets is None
    whole, store = (open_store(run / name) for name in ("whole.zarr", "store.zarr"))
    target = stored_rows(whole, "logits", 0, ids)
    target[known] = (target[known] + stored_rows(store, "logits", 0, ids[known])) / 2
    student = student_outputs(60)
    losses = task.losses(student, batch)
    assert losses["kd_0"].item() == pytest.approx(0.9 * kd_loss(student.logits, target, 4.0).mean().item(), rel=1e-5)
    alone = task_of(run, LENIENT, ("whole.zarr",))
    assert first_batch(alone, 60)[0].has_targets is None


def test_rows_of_missing_samples_are_never_read(run):
    store = open_store(run / "store.zarr")
    source = join(store, ALL, [], "hard-labels")
    assert (source.rows < 0).tolist() == [False] * KNOWN + [True] * 40
    targets = Targets([source], DEVICE)
    (known,) = targets.target_masks(torch.tensor([0, 79, 80, 119]))
    assert known.tolist() == [True, True, False, False]


def test_allowing_missing_targets_is_another_job(run, tmp_path):
    context, lenient = (tiny_context(tmp_path / name, train_set=ALL) for name in ("strict", "lenient"))
    specs = [open_distillation([run / "whole.zarr"], LOSSES, student, {}, context) for student in (STUDENT, LENIENT)]
    train_student(STUDENT, 0, specs[0], context)
    with pytest.raises(FingerprintMismatch, match=r"\w+\.missing_targets: stored 'error', wanted 'hard-labels'"):
        train_student(LENIENT, 0, specs[1], context)
    train_student(LENIENT, 0, specs[1], lenient)  # nothing is missing there: it is the same student
    models = [student_folder(each.run_dir, "distilled", 0).model.read_bytes() for each in (context, lenient)]
    assert models[0] == models[1]


def test_a_student_trains_where_targets_are_missing(run, tmp_path):
    context = tiny_context(tmp_path, train_set=ALL)
    spec = open_distillation([run / "store.zarr"], LOSSES, LENIENT, {}, context)
    train_student(LENIENT, 0, spec, context)
    lines = [json.loads(line) for line in student_folder(tmp_path, "distilled", 0).metrics.read_text().splitlines()]
    assert [set(line["losses"]) for line in lines] == [{"hard_labels", "kd_0", "hint_1"}] * 2
    assert sum(lines[1]["losses"].values()) < sum(lines[0]["losses"].values())


def test_disjoint_stores_each_cover_their_samples(run, tmp_path):
    rest = tiny_context(run / "other", train_set=ALL.take(torch.arange(KNOWN, len(ALL.labels))))
    cache_teacher(CACHE, tmp_path / "rest.zarr", load_teacher(TEACHER, 1, rest), LAYERS, rest)
    task = task_of(run, LENIENT, ("store.zarr", tmp_path / "rest.zarr"))
    assert task.targets.num_without_targets == 0
    batch, ids = first_batch(task, 60)
    known = torch.isin(ids, STORED.sample_ids)
    stores = [open_store(path) for path in (run / "store.zarr", tmp_path / "rest.zarr")]
    target = torch.empty(60, 4, device=DEVICE)
    for store, mask in zip(stores, (known, ~known), strict=True):
        target[mask] = stored_rows(store, "logits", 0, ids[mask])
    student = student_outputs(60)
    losses = task.losses(student, batch)
    assert losses["kd_0"].item() == pytest.approx(0.9 * kd_loss(student.logits, target, 4.0).mean().item(), rel=1e-5)


def test_number_of_samples_without_targets(run):
    assert task_of(run, LENIENT).targets.num_without_targets == len(ALL.labels) - KNOWN
    assert task_of(run, LENIENT, ("whole.zarr",)).targets.num_without_targets == 0
