"""A step that shows several kinds of views: cross entropy and losses on each, or across them.

The test of two processes runs this file as a script, which forks.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.device import DEVICE
from support.tiny_run import (
    CACHE,
    LOSSES,
    STUDENT,
    TEACHER,
    StopAfter,
    make_tiny_store,
    stored_rows,
    tiny_context,
)
from support.tiny_training import equal_weights
from support.two_processes import free_port, run_two_processes

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.task_builder import build_student, build_task
from kdpipe.stages.errors import RecipeError, StoppedEarly
from kdpipe.stages.losses.distillation import required_of, student_layers
from kdpipe.stages.losses.features.fitnet import FitNet
from kdpipe.stages.losses.logits.kd import KD, LogitMSE, kd_loss
from kdpipe.stages.losses.logits.mlld import MLLD, mlld_loss
from kdpipe.stages.losses.relations.crd import CRD
from kdpipe.stages.losses.relations.sp import SP, sp_loss
from kdpipe.stages.losses.statistics.at import ATGradient
from kdpipe.stages.models.hooks import ModelOutput, extract_features
from kdpipe.stages.runtime.distributed import SINGLE, init_distributed
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.teacher import load_teacher
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.task import TrainingTask
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.renderer import Renderer
from kdpipe.store import open_store

KINDS = Views(2, kinds={"weak": ["RandomHorizontalFlip"], "strong": [{"name": "RandomCrop", "padding": 2}]})
CONFIG = TrainConfig(epochs=2, batch_size=32, lr=0.02, checkpoint_every_s=0, precision="float32")


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    made = tiny_context(tmp_path_factory.mktemp("kinds"), views=KINDS)
    make_tiny_store(made)
    gradient = required_of([ATGradient()], {}, 0)
    cache_teacher(CACHE, made.run_dir / "gradient.zarr", load_teacher(TEACHER, 0, made), gradient, made)
    return made


def task_of(context, losses, *, network=None, labels=(), weight=0.5, store="store", **changes):
    student = dataclasses.replace(STUDENT, hard_label_weight=weight, hard_label_views=labels)
    spec = open_distillation([context.run_dir / f"{store}.zarr"], losses, student, {}, context)
    network = network or build_student(STUDENT, 0, context)
    return dataclasses.replace(build_task(network, spec, 0, context, hard_label_views=labels), **changes)


class Setting:
    """The first batch of the second epoch, random outputs of a student, and the rows of the store for them."""

    def __init__(self, context, task):
        self.batch = next(task.stream(3, 20, epoch=1, step=0, epochs=2))
        ids = context.train_set.sample_ids[task.order(3, 1)[:20]]
        store = open_store(context.run_dir / "store.zarr")
        self.labels = self.batch.hard.labels
        self.stored = {
            kind: {name: stored_rows(store, name, 2 + number, ids) for name in ("logits", "features/stage2")}
            for number, kind in enumerate(KINDS.kinds)
        }
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(40, 4, generator=generator).to(DEVICE).requires_grad_()
        self.maps = torch.randn(40, 8, 4, 4, generator=generator).to(DEVICE)
        output = ModelOutput(self.logits, {"stage2": self.maps})
        self.losses = task.losses(output, self.batch)
        self.weak, self.strong = self.logits[:20], self.logits[20:]

    def teacher(self, kind):
        return self.stored[kind]["logits"]


def close(found, expected):
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_step_shows_each_image_in_all_kinds(context):
    task = task_of(context, LOSSES)
    indices = task.order(3, 1)[:20]
    setting, ids = Setting(context, task), context.train_set.sample_ids[indices]
    renderer, images = Renderer(KINDS, 1, (8, 8)), context.train_set.images[indices]
    shown = torch.cat([renderer.render_batch(images, ids, view) for view in (2, 3)])
    assert torch.equal(setting.batch.images.cpu(), task.normalize(shown))
    for teacher, kind in zip(setting.batch.teachers, KINDS.kinds, strict=True):
        assert torch.equal(teacher.logits, setting.teacher(kind))
    parts = list(setting.batch.split(3))
    assert [part.num_samples for part in parts] == [7, 7, 6]
    assert torch.equal(torch.cat([part.images[: part.num_samples] for part in parts]), setting.batch.images[:20])
    assert torch.equal(torch.cat([part.images[part.num_samples :] for part in parts]), setting.batch.images[20:])


def test_by_default_losses_are_means_over_the_kinds(context):
    found = Setting(context, task_of(context, [KD(temperature=2.0), MLLD(temperature_list=(4.0,)), LOSSES[1]]))
    pairs = [(found.weak, found.teacher("weak")), (found.strong, found.teacher("strong"))]
    close(found.losses["hard_labels"], 0.5 * F.cross_entropy(found.logits, found.labels.repeat(2)))
    close(found.losses["kd_0"], KD().weight * sum(kd_loss(*pair, 2.0).mean() for pair in pairs) / 2)
    close(found.losses["mlld_1"], sum(mlld_loss(*pair, 4.0) for pair in pairs) / 2)
    assert found.losses["hint_2"].isfinite()


def test_a_loss_can_be_of_one_kind_or_across_kinds(context):
    losses = [
        LogitMSE(view="strong"),
        LogitMSE(view="strong", target_view="weak", weight=3.0),
        LogitMSE(target_view="weak"),
        LogitMSE(view="strong", target="student", target_view="weak"),
        LogitMSE(target="student", target_view="weak"),
    ]
    found = Setting(context, task_of(context, losses, labels=("weak",)))
    close(found.losses["hard_labels"], 0.5 * F.cross_entropy(found.weak, found.labels))
    values = [value / one.weight for value, one in zip(list(found.losses.values())[1:], losses, strict=True)]

    def mse(first, second):
        return (first - second).square().mean()

    weak = found.teacher("weak")
    close(values[0], mse(found.strong, found.teacher("strong")))
    close(values[1], mse(found.strong, weak))
    close(values[2], (mse(found.strong, weak) + mse(found.weak, weak)) / 2)
    close(values[3], mse(found.strong, found.weak))
    close(values[4], mse(found.strong, found.weak))
    (gradient,) = torch.autograd.grad(found.losses["logit_mse_3"], found.logits)
    assert gradient[:20].abs().sum() == 0 < gradient[20:].abs().sum()


def test_features_of_the_student_in_another_view_are_a_target(context):
    """Layers that no store has."""
    loss = SP(layers=(("stage2", "stage1"),), view="strong", target="student", target_view="weak")
    network = build_student(STUDENT, 0, context)
    task = task_of(context, [KD(), loss], network=network)
    batch = next(task.stream(3, 20, epoch=1, step=0, epochs=2))
    with extract_features(network.model.to(DEVICE), student_layers([loss])) as student:
        output = student(batch.images)
    strong, weak = output.features["stage2"][20:], output.features["stage1"][:20]
    close(task.losses(output, batch)["sp_1"], loss.weight * sp_loss(strong, weak))


def test_input_gradients_are_of_each_view(context):
    task = task_of(context, [ATGradient(view="strong")], store="gradient")
    network = build_student(STUDENT, 0, context)
    batch = next(task.stream(3, 20, epoch=0, step=0, epochs=2))
    batch.images.requires_grad_()
    losses = task.losses(ModelOutput(network.model.to(DEVICE).eval()(batch.images), {}), batch)
    own = batch.images[20:].detach().requires_grad_()
    cross_entropy = F.cross_entropy(network.model(own), batch.hard.labels, reduction="sum")
    (gradient,) = torch.autograd.grad(cross_entropy, own)
    alone = dataclasses.replace(task, distillation=task.distillation)
    views = [alone.distillation_batch(ModelOutput(batch.images, {}), batch.in_kind(kind, 2), 20) for kind in (0, 1)]
    views[1] = dataclasses.replace(views[1], input_gradient=task.normalize.to_pixel_gradient(gradient))
    close(losses["at_gradient_0"], alone.distillation(*views)["at_gradient_0"])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (KD(view="strnog"), r"distill.0 \(kd\): view: views.kinds has no kind 'strnog'; did you mean 'strong'"),
        (KD(target_view="soft"), "target_view: views.kinds has no kind 'soft'"),
        (KD(target="student"), "target = 'student' needs target_view"),
        (KD(view="weak", target="student", target_view="weak"), "compares the view 'weak' with itself"),
        (KD(store=0, target="student", target_view="weak"), "learns from no store: leave out store = 0"),
        (FitNet(layers=LOSSES[1].layers, target="student", target_view="weak"), "needs stages of its own"),
        (ATGradient(target="student", target_view="weak"), "needs more of a teacher than logits and features"),
        (CRD(layers=LOSSES[1].layers), "contrasts samples in one kind of view: name it, as in view = 'weak'"),
    ],
)
def test_losses_that_cannot_be_of_these_kinds_are_refused(context, loss, message):
    with pytest.raises(RecipeError, match=message):
        task_of(context, [loss])


def test_kinds_without_kinds_are_refused(tmp_path):
    context = tiny_context(tmp_path)
    with pytest.raises(RecipeError, match="view names the kind of view 'weak', and there are no kinds: set views.kin"):
        open_distillation([tmp_path / "store.zarr"], [KD(view="weak")], STUDENT, {}, context)
    student = dataclasses.replace(STUDENT, hard_label_views=("weak",))
    with pytest.raises(RecipeError, match=r"student.hard_label_views names the kind"):
        open_distillation([tmp_path / "store.zarr"], LOSSES, student, {}, context)


def test_negatives_of_a_contrastive_loss_are_of_its_view(context):
    task = task_of(context, [CRD(layers=LOSSES[1].layers, view="strong", num_negatives=64, dim=4)])
    batch = next(task.stream(3, 20, epoch=1, step=0, epochs=2))
    negatives = batch.negatives["crd_0"]
    ids = context.train_set.sample_ids.sort().values[negatives.ranks.cpu()]
    stored = stored_rows(open_store(context.run_dir / "store.zarr"), "features/stage2", 3, ids)
    (found,) = negatives.features.values()
    assert torch.allclose(found, stored.mean((2, 3)), atol=1e-6)


def test_a_teacher_is_trained_in_the_first_kind_alone(context):
    task = TrainingTask(context.train_loader, 2, build_student(STUDENT, 0, context).normalize, fresh_views=True)
    assert [task.views_at(passes) for passes in (0, 1)] == [[-2, -1], [-4, -3]]
    first = dataclasses.replace(task, first_kind=True)
    assert [first.views_at(passes) for passes in (0, 1)] == [[-2], [-4]]
    batch = next(first.stream(0, 20, epoch=0, step=0, epochs=1))
    indices = first.order(0, 0)[:20]
    weak = Renderer(Views(2, KINDS.kinds["weak"]), 1, (8, 8))
    shown = weak.render_batch(context.train_set.images[indices], context.train_set.sample_ids[indices], -2)
    assert torch.equal(batch.images.cpu(), task.normalize(shown))


LEARNED = [KD(view="strong", target_view="weak"), LOSSES[1], KD(target="student", target_view="weak")]


def test_micro_batches_have_the_gradient_of_the_whole(context):
    network = build_student(STUDENT, 0, context)
    task = task_of(context, LEARNED, network=network)
    batch = next(task.stream(3, 20, epoch=1, step=0, epochs=2))
    task.distillation.to(DEVICE).eval()
    parameters = list(network.model.to(DEVICE).eval().parameters())

    def gradients(count):
        total = 0
        with extract_features(network.model, student_layers(LEARNED)) as student:
            for part in batch.split(count):
                losses = task.losses(student(part.images), part)
                total += sum(losses.values()) * part.num_samples / batch.num_samples
        return torch.autograd.grad(total, parameters)

    for whole, parts in zip(gradients(1), gradients(3), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-5)


def trained(context, folder, *, monitor=None, processes=SINGLE):
    folder.mkdir(exist_ok=True)
    network = build_student(STUDENT, 0, context)
    task = task_of(context, LEARNED, network=network)
    job = TrainJob(
        "train",
        "x",
        network.model,
        task,
        None,
        CONFIG,
        0,
        JobDir(folder),
        student_layers(LEARNED),
        process_group=processes,
    )
    train(job, DEVICE, monitor or RunMonitor())
    return network.model


def test_resumed_equals_uninterrupted(context, tmp_path):
    whole, stops = trained(context, tmp_path / "whole"), 0
    while True:
        try:
            pieces = trained(context, tmp_path / "pieces", monitor=RunMonitor(should_stop=StopAfter(3)))
            break
        except StoppedEarly:
            stops += 1
    assert stops > 2
    assert equal_weights(whole, pieces)


def test_two_processes_train_the_student_of_one(context, tmp_path):
    assert run_two_processes(__file__, context.run_dir) == [0, 1]
    one, two = trained(context, tmp_path / "one").state_dict(), torch.load(context.run_dir / "two.pt")
    for name in one:
        torch.testing.assert_close(one[name].cpu(), two[name], rtol=1e-3, atol=1e-4, msg=name)


def run_process(rank, folder, port):
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    with init_distributed(os.environ) as processes:
        context = tiny_context(folder, views=KINDS, process_group=processes)
        model = trained(context, folder / "two", processes=processes)
    if rank == 0:
        torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, folder / "two.pt")
    (folder / f"{rank}.json").write_text(json.dumps(rank))


def main(folder):
    port = free_port()
    child = os.fork()
    run_process(int(child == 0), folder, port)
    if child:
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
