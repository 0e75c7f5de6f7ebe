"""Measure the overhead of caching: `cache-teacher` against the teacher's forward passes alone.

    uv run python benchmarks/cache_overhead.py [cifar] [mnist] [--rounds N]

Both render the same views and run the same forward passes, in turn in one process; `cache-teacher` also encodes,
checks, measures, writes, fsyncs and commits every unit, into a new store each time. The result is the median over the
rounds of the ratio of the rates. The images are random: their content does not change the cost.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

import torch

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.cache_teacher.plan import CacheConfig
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.loader.image_loader import ViewRequest
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.runtime.gpu.device import choose_device
from kdpipe.stages.runtime.memory import disable_malloc_trim
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.views.config import Views

CONFIG = CacheConfig(shard_bytes=8 * 2**20, batch_size=256)
"""Shards of an eighth of the default size: a round has as many units as a real job, and more files per byte."""

TARGETS = {"logits": 0.97, "logits and a layer's maps": 0.90}


@dataclass(frozen=True)
class Case:
    """A teacher, its data, and the layer whose maps are stored."""

    teacher: ModelConfig
    image_shape: tuple[int, int, int]
    num_classes: int
    num_samples: int
    layer: str
    padding: int


CASES = {
    "cifar": Case(ModelConfig(name="resnet32x4"), (3, 32, 32), 100, 1024, "layer3", 4),
    "mnist": Case(ModelConfig(name="cnn", args={"width": 32}), (1, 28, 28), 10, 10_000, "stage2", 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    disable_malloc_trim()  # as the command line does
    device = choose_device(arguments.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"{where}, torch {torch.__version__}, median of {arguments.rounds} rounds\n")
    print("| teacher | stored | bare, images/s | cached, images/s | ratio | target |\n|---|---|---:|---:|---:|---|")
    for name in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            measure(CASES[name], Path(folder), device, arguments.rounds)


def measure(case: Case, folder: Path, device: torch.device, num_rounds: int) -> None:
    """Print a row for each choice of stored arrays."""
    context, teacher = make_setup(case, folder, device)
    for stored, target in TARGETS.items():
        layers = [] if stored == "logits" else [FeatureSpec(case.layer)]
        bare, cached = [], []
        turns = [(bare, partial(forward_only, context, teacher)), (cached, partial(cache, context, teacher, layers))]
        for number in range(num_rounds + 1):
            for rates, run in turns if number % 2 else turns[::-1]:  # alternate the order
                rates.append(rate(case, run))
            shutil.rmtree(context.run_dir / "store.zarr")
        del bare[0], cached[0]  # the first round warms up
        ratio = statistics.median(own / base for own, base in zip(cached, bare, strict=True))
        verdict = "met" if ratio >= target else "NOT met"
        print(
            f"| {case.teacher.name} | {stored} | {statistics.median(bare):,.0f} | {statistics.median(cached):,.0f} "
            f"| {ratio:.3f} | {target} {verdict} |",
            flush=True,
        )


def rate(case: Case, run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return case.num_samples / (time.perf_counter() - started)


@torch.inference_mode()
def forward_only(context: StageContext, teacher: ModelBundle) -> None:
    """Run the views and forward passes of `cache`, in batches of the same size, and store nothing."""
    train_set = context.train_set
    for indices in torch.arange(train_set.num_samples).split(CONFIG.batch_size):
        logits = teacher.model(teacher.normalize(context.train_loader.get(ViewRequest(indices, 0)).images))
    logits.cpu()  # synchronizes a GPU


def cache(context: StageContext, teacher: ModelBundle, layers: list[FeatureSpec]) -> None:
    cache_teacher(CONFIG, context.run_dir / "store.zarr", teacher, layers, context)


def make_setup(case: Case, folder: Path, device: torch.device) -> tuple[StageContext, ModelBundle]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (case.num_samples, *case.image_shape), dtype=torch.uint8, generator=generator)
    labels = torch.arange(case.num_samples) % case.num_classes
    classes = tuple(map(str, range(case.num_classes)))
    image_set = ImageSet("random", "train", images, labels, torch.arange(case.num_samples), classes)
    operations = ({"name": "RandomCrop", "padding": case.padding}, {"name": "RandomHorizontalFlip"})
    views = Views(num_views=1, operations=operations)
    context = StageContext(folder, image_set, image_set, views, device, RunMonitor())
    model = context.build_model(case.teacher, 0).eval().to(device)
    channels = case.image_shape[0]
    normalize = Normalization((0.5,) * channels, (0.25,) * channels)
    return context, ModelBundle(model, context.architecture(case.teacher), normalize)


if __name__ == "__main__":
    main()
