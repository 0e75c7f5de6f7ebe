"""Tests of the training task: which samples are learned from, and what their labels add."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from support.device import DEVICE
from support.tiny_run import STUDENT, TEACHER, make_tiny_store, open_tiny_spec, squares, tiny_context

from kdpipe.pipeline.steps import train_student, train_teacher
from kdpipe.stages.data.labeling import keep_labels
from kdpipe.stages.data.loader.image_loader import ImageLoader
from kdpipe.stages.data.loader.sampling import epoch_order
from kdpipe.stages.distillation.student_config import student_folder
from kdpipe.stages.errors import DataError
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.training.task import TrainingTask


def task_of(image_set):
    return TrainingTask(ImageLoader(image_set, DEVICE), 4, Normalization((0.0,), (1.0,)))


def test_without_a_teacher_labeled_samples_are_repeated():
    few = keep_labels(squares(300, 0), 40)
    task = task_of(few)
    epochs = torch.cat([task.order(7, epoch) for epoch in range(4)])  # 30 passes
    assert len(epochs) == 1200
    for one in epochs.split(40):
        assert sorted(one.tolist()) == few.labeled.tolist()
    assert not torch.equal(epochs[:40], epochs[40:80])


def test_with_all_labels_an_epoch_is_one_pass():
    image_set = squares(300, 0)
    by_id = torch.argsort(image_set.sample_ids)
    assert torch.equal(task_of(image_set).order(7, 3), by_id[epoch_order(7, 3, 300)])


@pytest.mark.parametrize(("kept", "batch_size", "views"), [("all", 150, [0, 0, 1]), (40, 100, [0, 2, 1])])
def test_each_pass_over_the_samples_has_its_view(kept, batch_size, views):
    """With 40 labels the steps of 100 begin in the passes 0, 2 and 5."""
    seen = []
    loader = SimpleNamespace(
        dataset=keep_labels(squares(300, 0), kept),
        renderer=None,
        stream=lambda requests: iter(seen.extend(request.view for request in requests) or ()),
    )
    list(TrainingTask(loader, 4, None).stream(0, batch_size, epoch=0, step=0, epochs=2))
    assert seen[:3] == views


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    context = tiny_context(tmp_path_factory.mktemp("unlabeled"))
    return context, make_tiny_store(context)


def distilled(run, folder, kept, hard_label_weight=0.5):
    """Train a student from the store of all labels, and return its weights and result."""
    train_set = keep_labels(run[0].train_set, kept)
    context = tiny_context(folder, train_set=train_set)
    spec = dataclasses.replace(open_tiny_spec(run[1], context), hard_label_weight=hard_label_weight)
    result = train_student(STUDENT, 0, spec, context)
    return student_folder(folder, "distilled", 0).model.read_bytes(), result


def test_no_labels_equal_no_weight_of_them(run, tmp_path):
    none, _ = distilled(run, tmp_path / "none", "none")
    assert none == distilled(run, tmp_path / "all", "all", hard_label_weight=0.0)[0]
    assert none != distilled(run, tmp_path / "few", 40)[0]


def test_nothing_is_learned_without_labels_and_teacher(run, tmp_path):
    context = tiny_context(tmp_path, train_set=keep_labels(run[0].train_set, "none"))
    with pytest.raises(DataError, match="no train image of squares has a label"):
        train_student(STUDENT, 0, None, context)
    with pytest.raises(DataError, match="no train image of squares has a label"):
        train_teacher(TEACHER, 0, context)


def test_unlabeled_test_images_are_judged_by_agreement(run, tmp_path):
    labels = run[0].test_set.labels
    teacher = torch.eye(4)[labels]  # which is always right
    test_set = keep_labels(run[0].test_set, "none")
    context = tiny_context(tmp_path, test_set=test_set, get_teacher_logits=lambda part: lambda rows: teacher[rows])
    result = train_student(STUDENT, 0, open_tiny_spec(run[1], context), context)
    assert (result["metric"], "accuracy" in result, "best_accuracy" in result) == ("agreement", False, False)
    known = tiny_context(tmp_path / "known")
    assert result["agreement"] == train_student(STUDENT, 0, open_tiny_spec(run[1], known), known)["accuracy"]
    with pytest.raises(DataError, match="the test images of squares have no labels"):
        unknown = tiny_context(tmp_path / "unknown", test_set=test_set)
        train_student(STUDENT, 0, open_tiny_spec(run[1], unknown), unknown)
