"""Compare a student's epoch with stored targets to hard labels alone, and to the teacher in the loop.

    uv run python benchmarks/epoch_cost.py [mnist] [cifar] [photos] [--rounds N]

Every variant trains the same student with the real training loop, one epoch at a time, in turn in one process; the
result is the median over the rounds of the ratio to the epoch with hard labels alone in the same round. The images are
random: their content does not change the cost. The photographs are JPEG files of unequal size, decoded and cropped to
224 pixels by worker processes; the images of the other pairs are in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

import numpy as np
import torch
from PIL import Image

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.cache_teacher.plan import CacheConfig
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.data.loader.image_loader import ImageBatch
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.distillation.task_builder import build_task, student_shapes
from kdpipe.stages.losses.distillation import required_of, student_layers
from kdpipe.stages.losses.features.hint import Hint
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.losses.statistics.at import AT
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import extract_features
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.runtime.gpu.device import choose_device
from kdpipe.stages.runtime.memory import disable_malloc_trim
from kdpipe.stages.targets.feature_spec import FeatureSpec, source_shapes
from kdpipe.stages.targets.outputs import DenseTargets, TeacherTargets
from kdpipe.stages.targets.resolve import smallest_feature
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.task import Batch, StepPosition, TrainingTask
from kdpipe.stages.views.config import Views


@dataclasses.dataclass(frozen=True)
class Pair:
    """A teacher and a student, their data, and the layers of a hint."""

    teacher: ModelConfig
    student: ModelConfig
    image_shape: tuple[int, int, int]
    num_classes: int
    num_samples: int
    batch_size: int
    hint: tuple[str, str]
    files: bool = False


PAIRS = {
    "mnist": Pair(
        ModelConfig(name="cnn", args={"width": 32}),
        ModelConfig(name="cnn", args={"width": 6}),
        (1, 28, 28),
        num_classes=10,
        num_samples=6400,
        batch_size=128,
        hint=("stage2", "stage2"),
    ),
    "cifar": Pair(
        ModelConfig(name="resnet32x4"),
        ModelConfig(name="resnet8x4"),
        (3, 32, 32),
        num_classes=100,
        num_samples=512,
        batch_size=64,
        hint=("layer3", "layer3"),
    ),
    "photos": Pair(
        ModelConfig(name="torchvision:resnet50"),
        ModelConfig(name="torchvision:resnet18"),
        (3, 224, 224),
        num_classes=10,
        num_samples=64,
        batch_size=16,
        hint=("layer4", "layer4"),
        files=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class TeacherInTheLoop(TrainingTask):
    """The training task with the teacher in the loop, which stored targets replace."""

    teacher: ModelBundle | None = None

    def _batch(self, position: StepPosition, image_batch: ImageBatch) -> Batch:
        assert self.teacher is not None
        batch = super()._batch(position, image_batch)
        with torch.no_grad(), extract_features(self.teacher.model, ()) as extractor:
            logits = extractor(self.teacher.normalize(image_batch.images)).logits
            return dataclasses.replace(batch, teachers=[DenseTargets(logits, {})], target_masks=[None])


@dataclasses.dataclass(frozen=True)
class FixedTargets(TrainingTask):
    """The training task with the first batch's targets for every batch: the cost of the losses without reading."""

    fixed: Sequence[TeacherTargets] = ()

    def _batch(self, position: StepPosition, image_batch: ImageBatch) -> Batch:
        return dataclasses.replace(super()._batch(position, image_batch), teachers=self.fixed, target_masks=[None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", default=list(PAIRS), help=", ".join(PAIRS))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    disable_malloc_trim()  # as the command line does
    for name in arguments.pairs:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, PAIRS[name], Path(folder), arguments.rounds)


def measure(name: str, pair: Pair, folder: Path, num_rounds: int) -> None:
    context = make_setup(pair, folder)
    teacher, student = make_network(pair.teacher, context), make_network(pair.student, context)
    tasks = make_tasks(pair, teacher, student, context)
    times: dict[str, list[float]] = {variant: [] for variant in tasks}
    for number in range(num_rounds + 1):
        for variant, task in tasks.items():
            time_s = one_epoch(pair, student, task, context, folder / "jobs" / f"{variant}-{number}")
            if number:  # the first round warms up: files, caches, allocator
                times[variant].append(time_s)
    device = torch.cuda.get_device_name() if context.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}: {pair.teacher.name} -> {pair.student.name}, {pair.num_samples:,} images an epoch, {device}")
    print(f"  {'hard labels alone':<34} {statistics.median(times['alone']):8.3f} s an epoch")
    for variant, text in VARIANTS.items():
        ratios = [time_s / alone for time_s, alone in zip(times[variant], times["alone"], strict=True)]
        median_s = statistics.median(times[variant])
        print(f"  {text:<34} {median_s:8.3f} s an epoch, {statistics.median(ratios):6.3f} of hard labels alone")
    gains = [live / stored for live, stored in zip(times["live"], times["logits"], strict=True)]
    print(f"  stored logits beat the teacher in the loop {statistics.median(gains):.2f} times")


VARIANTS = {
    "logits": "stored logits",
    "statistic": "stored logits and an attention map",
    "features": "stored logits and a feature map",
    "fixed": "the same, targets not read",
    "live": "the teacher in the loop (logits)",
}


def make_setup(pair: Pair, folder: Path) -> StageContext:
    if pair.files:
        return photographs(pair, folder)
    generator = torch.Generator().manual_seed(0)

    def images(split: str, count: int) -> ImageSet:
        pixels = torch.randint(256, (count, *pair.image_shape), dtype=torch.uint8, generator=generator)
        labels = torch.randint(pair.num_classes, (count,), generator=generator)
        classes = tuple(map(str, range(pair.num_classes)))
        return ImageSet("random", split, pixels, labels, torch.arange(count), classes)

    operations = ({"name": "RandomCrop", "padding": 2}, {"name": "RandomHorizontalFlip"})
    views = Views(num_views=2, operations=operations)
    return StageContext(
        folder, images("train", pair.num_samples), images("test", 64), views, choose_device("auto"), RunMonitor()
    )


def photographs(pair: Pair, folder: Path) -> StageContext:
    """Make JPEG files of about ImageNet's size: enlarged noise, which takes as long to decode."""
    rng = np.random.default_rng(0)
    for number in range(pair.num_samples):
        path = folder / "images" / "train" / f"class{number % pair.num_classes}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(256, size=(50, 50, 3), dtype=np.uint8))
        noise.resize((500, 333 + number % 43), Image.Resampling.BICUBIC).save(path, quality=90)
    (folder / "images" / "test").symlink_to("train")
    data = DataConfig(name=f"imagefolder:{folder / 'images'}")
    size = pair.image_shape[1]
    operations = ({"name": "RandomResizedCrop", "size": size}, {"name": "RandomHorizontalFlip"})
    views = Views(num_views=2, engine="transforms", operations=operations)
    test_set = load_dataset(data, "test", size=size).take(torch.arange(pair.batch_size))
    return StageContext(folder, load_dataset(data, "train"), test_set, views, choose_device("auto"), RunMonitor())


def make_network(config: ModelConfig, context: StageContext) -> ModelBundle:
    channels = context.train_set.in_channels
    model = context.build_model(config, seed=0).to(context.device).eval()
    return ModelBundle(model, context.architecture(config), Normalization((0.5,) * channels, (0.25,) * channels))


def make_tasks(
    pair: Pair, teacher: ModelBundle, student: ModelBundle, context: StageContext
) -> dict[str, TrainingTask]:
    path = context.run_dir / "store.zarr"
    config = StudentConfig(model=pair.student)
    kd, hint = KD(loss="kd"), Hint(loss="hint", layers=(pair.hint,))
    at = AT(loss="at", layers=(pair.hint,))
    shapes = source_shapes(teacher.model, [FeatureSpec(pair.hint[1])], context.image_shape)
    required = required_of([hint, at], student_shapes(config, [hint, at], context), 0)
    stored = [smallest_feature(feature, shapes[feature.source]) for feature in required]
    cache_teacher(CacheConfig(), path, teacher, stored, context)
    logits, statistic, features = (
        build_task(student, open_distillation([path], losses, config, {}, context), 0, context)
        for losses in ([kd], [kd, at], [kd, hint])
    )
    return {
        "alone": TrainingTask(context.train_loader, context.views.num_views, student.normalize),
        "logits": logits,
        "statistic": statistic,
        "features": features,
        "fixed": FixedTargets(
            context.train_loader,
            context.views.num_views,
            student.normalize,
            distillation=features.distillation,
            hard_label_weight=features.hard_label_weight,
            fixed=next(features.stream(0, pair.batch_size, epoch=0, step=0, epochs=1)).teachers,
        ),
        "live": TeacherInTheLoop(
            context.train_loader,
            context.views.num_views,
            student.normalize,
            distillation=logits.distillation,
            hard_label_weight=logits.hard_label_weight,
            teacher=teacher,
        ),
    }


def one_epoch(pair: Pair, student: ModelBundle, task: TrainingTask, context: StageContext, folder: Path) -> float:
    folder.mkdir(parents=True)
    config = TrainConfig(epochs=1, batch_size=pair.batch_size, checkpoint_every_s=1e6)
    layers = student_layers(list(task.distillation.configs.values()) if task.distillation else [])
    test = context.evaluation(student.normalize)
    job = TrainJob("benchmark", "epoch", student.model, task, test, config, 0, JobDir(folder), layers)
    started = time.perf_counter()
    train(job, context.device, RunMonitor())
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
