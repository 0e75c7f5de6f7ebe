"""A student of another resolution than its teacher: the teacher's views, resized."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from support.tiny_run import LOSSES, STUDENT, TEACHER, VIEWS, make_tiny_store, squares, tiny_context
from torch import Tensor

from kdpipe.pipeline.steps import compress_student, train_student
from kdpipe.stages.compress.artifacts.load import rebuild
from kdpipe.stages.compress.compress import CompressConfig
from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.context import StageContext, require_fitting_test_images
from kdpipe.stages.data.decode import with_size
from kdpipe.stages.data.loader.image_loader import ViewRequest
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import student_folder
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.errors import DataError, RecipeError
from kdpipe.stages.losses.statistics.at import ATGradient
from kdpipe.stages.teacher import untrained_teacher
from kdpipe.stages.train_student.preflight import dry_run_losses
from kdpipe.stages.train_student.student import student_fingerprint
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.mix import MixConfig

SMALL = dataclasses.replace(STUDENT, image_size=6, seeds=(0,))
ROWS = ViewRequest(torch.arange(40), 2)


def _by_pillow(images: Tensor) -> Tensor:
    return torch.from_numpy(with_size(images.cpu().numpy(), 6, "test"))


@pytest.mark.parametrize(
    "views",
    [
        dataclasses.replace(VIEWS, mix=MixConfig(cutmix_alpha=1.0)),
        Views(3, [{"name": "RandomCrop", "size": 8, "padding": 1}], engine="transforms"),
    ],
    ids=["tensor", "transforms"],
)
def test_a_student_sees_the_very_views_resized(views: Views) -> None:
    context = tiny_context(Path(), views=views, num_workers=0)
    small = context.resized(6)
    assert small.image_shape == (1, 6, 6) and small.view_identity() == context.view_identity()
    assert torch.equal(small.train_loader.get(ROWS).images.cpu(), _by_pillow(context.train_loader.get(ROWS).images))
    tests = ViewRequest(torch.arange(80))
    assert torch.equal(small.test_loader.get(tests).images.cpu(), _by_pillow(context.test_set.images))


def test_the_size_of_the_views_changes_nothing() -> None:
    context = tiny_context(Path())
    assert context.resized(None) is context and context.resized(8) is context
    assert context.resized(6) is context.resized(6) and context.resized(6).resized(6) is context.resized(6)
    fingerprints = [
        student_fingerprint(config, 0, None, build_student(config, 0, context), context)
        for config in (STUDENT, dataclasses.replace(STUDENT, image_size=8), SMALL)
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert fingerprints[2]["starts_from"]["architecture"]["view_size"] == [8, 8]


def test_views_that_are_not_square_are_refused() -> None:
    context = tiny_context(Path(), views=Views(1, [{"name": "RandomCrop", "size": [8, 6]}]))
    with pytest.raises(RecipeError, match="student.image_size = 6 needs square views, and these are of 8 x 6"):
        context.resized(6)


def test_test_images_are_loaded_in_the_size_of_the_student() -> None:
    images = torch.randint(256, (80, 1, 6, 6), dtype=torch.uint8)
    context = tiny_context(Path())
    small = dataclasses.replace(context, load_test=lambda size: dataclasses.replace(context.test_set, images=images))
    assert torch.equal(small.resized(6).test_loader.get(ViewRequest(torch.arange(80))).images.cpu(), images)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageContext]:
    context = tiny_context(tmp_path_factory.mktemp("small"))
    return make_tiny_store(context), context


@pytest.mark.usefixtures("without_onnx")
def test_a_small_student_is_trained_and_pruned(stored: tuple[Path, StageContext]) -> None:
    path, context = stored
    config = dataclasses.replace(SMALL, train=TrainConfig(epochs=1, batch_size=32, lr=0.05))
    spec = open_distillation([path], LOSSES[:1], config, {}, context)
    figures = train_student(config, 0, spec, context)
    network = rebuild(student_folder(context.run_dir, "distilled", 0).model)
    assert network.architecture["image_size"] == [6, 6]
    tests = network.normalize(_by_pillow(context.test_set.images))
    with torch.no_grad():
        accuracy = (network.model(tests).argmax(1) == context.test_set.labels).double().mean()
    assert figures["accuracy"] == float(accuracy)
    compress = CompressConfig(
        steps=("prune",), baselines=False, prune=PruneConfig(ratio=0.5, round_to=1), prune_train=config.train
    )
    pruned, _ = compress_student(compress, config, 0, spec, context, steps=("prune",))
    assert pruned["pruned"]["num_macs"] < figures["num_macs"]


def test_layers_of_other_sizes_are_refused_before_training() -> None:
    context = tiny_context(Path())
    teacher = untrained_teacher(TEACHER, 0, context).model
    dry_run_losses(LOSSES, STUDENT, teacher, context)
    with pytest.raises(RecipeError, match=r"feature of shape \[8, 3, 3\] to a teacher's of shape \[16, 4, 4\]"):
        dry_run_losses(LOSSES, SMALL, teacher, context)


def test_images_of_one_class_are_refused() -> None:
    of_one = dataclasses.replace(squares(9, 0), labels=torch.zeros(9, dtype=torch.int64), class_names=("cat",))
    context = tiny_context(Path(), train_set=of_one, test_set=of_one)
    with pytest.raises(DataError, match="are all of one class, 'cat': there is nothing to tell apart"):
        require_fitting_test_images(context)


def test_a_loss_on_pixels_is_refused(stored: tuple[Path, StageContext]) -> None:
    path, context = stored
    with pytest.raises(RecipeError, match=r"distill.0 \(at_gradient\) compares gradients pixel by pixel.* = 6 gives"):
        open_distillation([path], [ATGradient()], SMALL, {}, context)
