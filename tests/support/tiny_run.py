"""A small pipeline for tests: images of bright squares, networks of a few hundred parameters."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdpipe.pipeline.recipe.load import Recipe
from kdpipe.pipeline.steps import cache_teacher, train_teacher
from kdpipe.stages.cache_teacher.plan import CacheConfig
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.losses.features.hint import Hint
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.teacher import TeacherConfig, load_teacher
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.views.config import Views
from kdpipe.store import TargetStore
from support.device import DEVICE

TRAIN = TrainConfig(epochs=2, batch_size=32, lr=0.05, checkpoint_every_s=0)
TEACHER = TeacherConfig(model=ModelConfig(name="cnn", args={"width": 8, "num_stages": 2}), train=TRAIN)
STUDENT = StudentConfig(model=ModelConfig(name="cnn", args={"width": 4, "num_stages": 2}), train=TRAIN, seeds=(0,))
LOSSES = (KD(loss="kd"), Hint(loss="hint", layers=(("stage2", "stage2"),), weight=1.0))
OPERATIONS = ({"name": "RandomCrop", "padding": 1}, {"name": "RandomHorizontalFlip"})
VIEWS = Views(num_views=3, operations=OPERATIONS)
CACHE = CacheConfig(shard_bytes=4096, batch_size=50)
LAYERS = [FeatureSpec("stage2")]
RECIPE = Recipe(
    name="tiny",
    device=str(DEVICE),
    num_threads=1,
    data=DataConfig(name="digits", num_train=64),
    views=dataclasses.replace(VIEWS, num_views=2),
    teacher=dataclasses.replace(TEACHER, train=dataclasses.replace(TRAIN, epochs=1)),
    cache=CACHE,
    student=dataclasses.replace(STUDENT, train=dataclasses.replace(TRAIN, epochs=1)),
    distill=(KD(loss="kd"),),
)


def squares(num_samples: int, seed: int, split: str = "train") -> ImageSet:
    """Noise with a bright square whose corner is the label: 4 classes, 8x8, gray."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num_samples,), generator=generator)
    images = torch.randint(120, (num_samples, 1, 8, 8), dtype=torch.uint8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        down, right = 4 * (label // 2), 4 * (label % 2)
        image[0, down : down + 4, right : right + 4] += 100
    ids = torch.randperm(10 * num_samples, generator=generator)[:num_samples]
    return ImageSet("squares", split, images, labels, ids, tuple("abcd"))


def subset(image_set: ImageSet, num_samples: int) -> ImageSet:
    """The first samples of a data set."""
    rows = slice(num_samples)
    return dataclasses.replace(
        image_set, images=image_set.images[rows], labels=image_set.labels[rows], sample_ids=image_set.sample_ids[rows]
    )


def tiny_context(run: Path, monitor: RunMonitor | None = None, **changes: Any) -> StageContext:
    context = StageContext(run, squares(300, 0), squares(80, 1, "test"), VIEWS, DEVICE, monitor or RunMonitor())
    return dataclasses.replace(context, **changes)


def make_tiny_store(
    context: StageContext, name: str = "store.zarr", teacher: TeacherConfig = TEACHER, seed: int = 0
) -> Path:
    """Train the tiny teacher and cache it; returns the store's path."""
    if (context.data_identity(), context.test_identity(), context.views) == _default_inputs() and (teacher, seed) == (
        TEACHER,
        0,
    ):
        shutil.copytree(_default_teacher(), context.run_dir / "teacher", dirs_exist_ok=True)
    train_teacher(teacher, seed, context)  # reuses the copied teacher if it is the same
    path = context.run_dir / name
    cache_teacher(CACHE, path, load_teacher(teacher, seed, context), LAYERS, context)
    return path


@functools.cache
def _default_inputs() -> tuple[Any, ...]:
    context = tiny_context(Path())
    return context.data_identity(), context.test_identity(), context.views


@functools.cache
def _default_teacher() -> Path:
    """Train the teacher that most tests use, once per process, and return its folder."""
    run = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, run)
    train_teacher(TEACHER, 0, tiny_context(run))
    return run / "teacher"


def open_tiny_spec(path: Path, context: StageContext) -> DistillationSpec:
    return open_distillation([path], LOSSES, STUDENT, {}, context)


def stored_rows(store: TargetStore, name: str, view: int, ids: Tensor) -> Tensor:
    """Rows of an array, read by themselves: float32 on the device."""
    return torch.from_numpy(store.gather(name, view, ids.numpy())).float().to(DEVICE)


class StopAfter:
    """A stop flag that is set at the n-th call."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0
