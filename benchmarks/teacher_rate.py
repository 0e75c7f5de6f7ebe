"""Measure the teacher's rate by precision and memory format: `cache-teacher` with storing, against eager float32.

    uv run python benchmarks/teacher_rate.py [resnet32x4] [resnet50] [vit_b_16] [...] [--images N] [--compile]

All ways fill new stores with the same images, in turn in one process, and the last one as `auto` chooses by its trial,
which is not counted: it is a small part of a long job. The ratio is the median over the rounds of the rates, to float32
and contiguous. The share of the peak is that of this machine's own matrix products of that precision, measured in the
same run. The images and weights are random: their content does not change the cost. On a machine with other jobs
`--clock cpu` counts this process's time on the CPU alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

import torch
from torch import nn

from kdpipe.stages.cache_teacher import trial
from kdpipe.stages.cache_teacher.cache import fill_store
from kdpipe.stages.cache_teacher.choice import settings_of, with_settings
from kdpipe.stages.cache_teacher.plan import CacheConfig, build_cache_job, plan_store, samples_in_row_order
from kdpipe.stages.compute.settings import EXACT, ComputeSettings, fast_precisions
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.evaluation.macs import count_macs
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.runtime.gpu.device import choose_device
from kdpipe.stages.runtime.memory import disable_malloc_trim
from kdpipe.stages.views.config import Views
from kdpipe.store import ensure_store

MIN_GAIN = 2.0
"""The least ratio of `auto` to float32 for the networks on 224 x 224 pixels, where there is bfloat16 in hardware."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Case:
    """A teacher and its images."""

    model: str
    size: int
    num_classes: int


CASES = {
    "resnet32x4": Case("resnet32x4", 32, 100),
    "resnet50": Case("resnet50", 224, 1000),
    "vit_b_16": Case("vit_b_16", 224, 1000),
    "efficientnet_lite0": Case("python:timm.models:efficientnet_lite0", 224, 1000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--images", type=int, default=32, help="images of a store")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--compile", action="store_true", help="each way compiled too, which takes minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_malloc_trim()  # as the command line does
    device = choose_device(arguments.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{arguments.threads} CPU threads"
    peaks = {one: gemm_rate(one, device, CLOCKS[arguments.clock]) for one in ("float32", *fast_precisions(device))}
    shown = ", ".join(f"{one} {rate / 1e12:.3g} TFLOP/s" for one, rate in peaks.items())
    print(f"{where}, torch {torch.__version__}; matrix products: {shown}\n")
    print("| teacher | computed in | images/s | ratio | share of the peak | |\n|---|---|---:|---:|---:|---|")
    for name in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, Path(folder), device, peaks, arguments)


def gemm_rate(
    precision: str, device: torch.device, clock: Callable[[], float] = time.perf_counter, size: int | None = None
) -> float:
    """Return the operations a second of a large matrix product, at best."""
    size, times_s = size or GEMM_SIZE[device.type], []
    settings = ComputeSettings(precision)  # type: ignore[arg-type]
    one, other = (torch.randn(size, size, device=device, dtype=settings.autocast_dtype) for _ in range(2))
    with settings.active(device):
        for _ in range(6):
            started = clock()
            product = one @ other
            float(product[0, 0])  # waits for a GPU
            times_s.append(clock() - started)
    return 2 * size**3 / min(times_s)


def measure(
    name: str, folder: Path, device: torch.device, peaks: dict[str, float], arguments: argparse.Namespace
) -> None:
    """Print a row for each way to compute a teacher."""
    case = CASES[name]
    context, teacher = make_setup(case, folder, device, arguments.images)
    flops = 2 * count_macs(teacher.model, context.image_shape)
    config = CacheConfig(batch_size=arguments.batch_size, max_kl=1e-2)
    ways = [ComputeSettings(one, other) for one in peaks for other in ("contiguous", "channels_last")]  # type: ignore[arg-type]
    folded = [replace(way, folded=True) for way in ways if way.memory_format == "channels_last"]
    ways += [replace(way, compile=True) for way in ways] if arguments.compile else []
    ways += folded if any(isinstance(module, nn.BatchNorm2d) for module in teacher.model.modules()) else []
    chosen = auto(config, teacher, context)
    rates: dict[ComputeSettings, list[float]] = {way: [] for way in ways}
    for number in range(arguments.rounds + 1):
        for way in ways if number % 2 else ways[::-1]:
            rates[way].append(rate(config, way, teacher, context, CLOCKS[arguments.clock]))
    for way in ways:
        own = rates[way][1:]  # the first round warms up
        ratio = statistics.median(one / exact for one, exact in zip(own, rates[EXACT][1:], strict=True))
        images_s = statistics.median(own)
        verdict = ""
        if way == chosen:
            verdict = "auto" if case.size < 224 or len(peaks) == 1 else f"auto, {verdict_of(ratio)}"
        share = images_s * flops / peaks[way.precision]
        print(f"| {name} | {way} | {images_s:,.1f} | {ratio:.2f} | {100 * share:.0f} % | {verdict} |", flush=True)


def verdict_of(ratio: float) -> str:
    return f"at least {MIN_GAIN}: {'met' if ratio >= MIN_GAIN else 'NOT met'}"


def auto(config: CacheConfig, teacher: ModelBundle, context: StageContext) -> ComputeSettings:
    """Return what a trial chooses for a large job."""
    planned = plan_store(config, teacher, [], samples_in_row_order(context), context)
    before = trial.WORTH_A_TRIAL
    trial.WORTH_A_TRIAL = dict.fromkeys(before, 1.0)
    is_large, trial.is_worth_a_trial = trial.is_worth_a_trial, lambda *_: True
    try:
        return settings_of(trial.decide(planned, config, teacher, [], context))
    finally:
        trial.WORTH_A_TRIAL, trial.is_worth_a_trial = before, is_large


def rate(
    config: CacheConfig,
    way: ComputeSettings,
    teacher: ModelBundle,
    context: StageContext,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the images a second of filling a new store: passes, checks, encoding, writing and committing."""
    path, samples = context.run_dir / "store.zarr", samples_in_row_order(context)
    planned = plan_store(config, teacher, [], samples, context)
    manifest = ensure_store(path, planned, samples, lambda new: with_settings(new, way, {}))
    job = build_cache_job(config, path, manifest, teacher, context)
    started = clock()
    fill_store(job, manifest.layout.units())
    seconds = clock() - started
    shutil.rmtree(path)
    return context.train_set.num_samples / seconds


def make_setup(case: Case, folder: Path, device: torch.device, num_images: int) -> tuple[StageContext, ModelBundle]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (num_images, 3, case.size, case.size), dtype=torch.uint8, generator=generator)
    labels, classes = torch.arange(num_images) % case.num_classes, tuple(map(str, range(case.num_classes)))
    image_set = ImageSet("random", "train", images, labels, torch.arange(num_images), classes)
    context = StageContext(folder, image_set, image_set, Views(num_views=1), device, RunMonitor())
    config = ModelConfig(name=case.model)
    model = context.build_model(config, 0).eval().to(device)
    return context, ModelBundle(model, context.architecture(config), Normalization((0.5,) * 3, (0.25,) * 3))


if __name__ == "__main__":
    main()
