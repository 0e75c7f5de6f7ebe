"""Students with one classifier for the labels and one for the teacher, as DeiT has."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from support.device import DEVICE
from support.tiny_run import STUDENT, StopAfter, make_tiny_store, stored_rows, tiny_context

from kdpipe.pipeline.steps import train_student
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import DISTILLED, student_folder
from kdpipe.stages.distillation.task_builder import build_student, build_task
from kdpipe.stages.errors import RecipeError, StoppedEarly
from kdpipe.stages.losses.features.fitnet import FitNet
from kdpipe.stages.losses.logits.kd import KD, kd_loss
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.hooks import extract_features
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.training.heads import Heads
from kdpipe.stages.views.config import Views
from kdpipe.store import open_store

HEADS = Heads(labels="head", distillation="head_dist")
TWO = dataclasses.replace(STUDENT, model=ModelConfig(name="python:support.tiny_families:TwoHeads"), heads=HEADS)
LOSSES = (KD(loss="kd", temperature=2.0),)
KINDS = Views(2, kinds={"weak": ["RandomHorizontalFlip"], "strong": [{"name": "RandomCrop", "padding": 2}]})


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    made = tiny_context(tmp_path_factory.mktemp("heads"))
    make_tiny_store(made)
    return made


def open_spec(context, student=TWO, losses=LOSSES):
    return open_distillation([context.run_dir / "store.zarr"], losses, student, {}, context)


def first_step(context, student):
    """The first batch's losses, the outputs of the student by module, and the labels and stored logits of its rows."""
    spec, network = open_spec(context, student), build_student(student, 0, context)
    task = build_task(network, spec, 0, context)
    batch = next(task.stream(3, 20, epoch=0, step=0, epochs=2))
    ids = context.train_set.sample_ids[task.order(3, 0)[:20]]
    stored = [stored_rows(open_store(context.run_dir / "store.zarr"), "logits", kind, ids) for kind in range(2)]
    with extract_features(network.model.to(DEVICE), ["head", "head_dist"]) as run:
        output = run(batch.images)
    return task.losses(output, batch), output, batch.hard.labels, stored


@pytest.mark.parametrize("chosen", [HEADS, Heads(), Heads(labels="head"), Heads(distillation="head_dist")])
def test_labels_and_teacher_are_learned_by_their_own_classifiers(context, chosen):
    losses, output, labels, stored = first_step(context, dataclasses.replace(TWO, heads=chosen))
    by_path = {None: output.logits, **output.features}
    expected = {
        "hard_labels": 0.1 * F.cross_entropy(by_path[chosen.labels], labels),
        "kd_0": LOSSES[0].weight * kd_loss(by_path[chosen.distillation], stored[0], 2.0).mean(),
    }
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-5
    )


def test_each_kind_of_views_is_learned_so(tmp_path):
    context = tiny_context(tmp_path, views=KINDS)
    make_tiny_store(context)
    losses, output, labels, stored = first_step(context, TWO)
    assert losses["hard_labels"].item() == pytest.approx(
        0.1 * F.cross_entropy(output.features["head"], labels.repeat(2)).item(), rel=1e-5
    )
    expected = kd_loss(output.features["head_dist"], torch.cat(stored), 2.0).mean()
    assert losses["kd_0"].item() == pytest.approx(LOSSES[0].weight * expected.item(), rel=1e-5)


def test_a_stopped_training_resumes_bit_for_bit(context, tmp_path):
    """Hint stages, which end before the classifiers, included."""
    losses = (*LOSSES, FitNet(loss="fitnet", layers=(("body.0", "stage2"),), stage_epochs=1))
    student, results = dataclasses.replace(TWO, export=False), []
    for name in ("whole", "stopped"):
        own = dataclasses.replace(context, run_dir=tmp_path / name)
        spec = open_spec(context, student, losses)
        if name == "stopped":
            stopping = dataclasses.replace(own, monitor=RunMonitor(should_stop=StopAfter(25)))
            with pytest.raises(StoppedEarly):
                train_student(student, 0, spec, stopping)
        train_student(student, 0, spec, own)
        results.append(student_folder(own.run_dir, DISTILLED, 0))
    assert results[0].model.read_bytes() == results[1].model.read_bytes()
    made_from = json.loads((results[0].path / "job.json").read_text())
    assert made_from["distillation"]["heads"] == {"labels": "head", "distillation": "head_dist"}


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (Heads(labels="hed"), r"student.heads.labels: the model has no module 'hed'; did you mean 'head'"),
        (Heads(distillation="body"), r"student.heads.distillation: 'body' returns \[96\] for each image, and logits"),
    ],
)
def test_other_modules_are_refused(context, heads, message):
    with pytest.raises(RecipeError, match=message):
        open_spec(context, dataclasses.replace(TWO, heads=heads))
