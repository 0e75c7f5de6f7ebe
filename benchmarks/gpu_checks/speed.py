"""Speed: the teacher's pass by precision, the student's step against its rivals, and photographs."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import epoch_cost
import teacher_rate
import torch
from torch import Tensor

from gpu_checks import Row, Settings, at_least, at_most
from kdpipe.stages.cache_teacher.plan import CacheConfig
from kdpipe.stages.compute.settings import ComputeSettings, fast_precisions
from kdpipe.stages.data.loader.image_loader import ViewRequest
from kdpipe.stages.evaluation.macs import count_macs
from kdpipe.stages.training.task import TrainingTask

NUM_ROUNDS = 3


def stage_one(settings: Settings) -> Iterator[Row]:
    """Measure images/s of cache-teacher, storing included, at each precision, as a share of the GEMM peak."""
    device = settings.torch_device
    size = settings.size(teacher_rate.GEMM_SIZE[device.type], 256)
    peaks = {one: teacher_rate.gemm_rate(one, device, size=size) for one in ("float32", *fast_precisions(device))}
    for precision, rate in peaks.items():
        yield Row(f"matrix products, {precision}: TFLOP/s", rate / 1e12)
    config = CacheConfig(batch_size=settings.size(256, 8))
    for name in ("resnet32x4",) if settings.toy else ("resnet50", "vit_b_16"):
        images = settings.size(2048, 16)
        context, teacher = teacher_rate.make_setup(teacher_rate.CASES[name], settings.folder(name), device, images)
        flops = 2 * count_macs(teacher.model, context.image_shape)
        for precision, peak in peaks.items():
            way = ComputeSettings(precision, "channels_last")  # type: ignore[arg-type]
            _, rate = (teacher_rate.rate(config, way, teacher, context) for _ in range(2))  # the first warms up
            yield Row(f"{name}, {way}: images/s", rate)
            yield Row(f"{name}, {way}: share of the peak", rate * flops / peak)
        yield Row(f"{name}, auto", str(teacher_rate.auto(config, teacher, context)))


def stage_two(settings: Settings) -> list[Row]:
    """Time epochs of resnet8x4: hard labels alone, stored targets, and resnet32x4 in the loop; gather targets."""
    pair = dataclasses.replace(epoch_cost.PAIRS["cifar"], num_samples=settings.size(6400, 64))
    context = epoch_cost.make_setup(pair, settings.folder("stage_two"))
    teacher, student = (epoch_cost.make_network(config, context) for config in (pair.teacher, pair.student))
    tasks = epoch_cost.make_tasks(pair, teacher, student, context)
    times: dict[str, list[float]] = {name: [] for name in ("alone", "logits", "features", "live")}
    for number in range(NUM_ROUNDS + 1):
        for name, found in times.items():
            folder = context.run_dir / "jobs" / f"{name}-{number}"
            found.append(epoch_cost.one_epoch(pair, student, tasks[name], context, folder))
    seconds = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first round warms up
    logits = seconds["logits"]
    return [
        Row("student alone: images/s", pair.num_samples / seconds["alone"]),
        at_most("stored logits, of hard labels alone", logits / seconds["alone"], 1.03),
        at_most("stored logits and a map, of hard labels alone", seconds["features"] / seconds["alone"], 1.1),
        at_least("stored logits, against the teacher in the loop", seconds["live"] / logits, 5),
        gather_rate(tasks["features"], context.device, pair.batch_size),
    ]


def gather_rate(task: TrainingTask, device: torch.device, batch_size: int) -> Row:
    """Measure how fast batches of targets reach the device."""
    assert task.targets is not None
    targets, order = task.targets, torch.randperm(task.num_samples, generator=torch.Generator().manual_seed(0))
    batches = order[: len(order) // batch_size * batch_size].split(batch_size)
    size = sum(feature.nbytes for feature in targets.batch(0, batches[0])[0].features.values())
    seconds = timed(lambda: [targets.batch(0, indices) for indices in batches], device)
    return Row(f"targets, {targets.residence}: GB/s", size * len(batches) / seconds / 1e9)


def photographs(settings: Settings) -> list[Row]:
    """Measure how many JPEGs a second the workers decode and crop to 224 pixels, to the device."""
    pair = dataclasses.replace(epoch_cost.PAIRS["photos"], num_samples=settings.size(1024, 16))
    context = epoch_cost.make_setup(pair, settings.folder("photographs"))
    batches = torch.arange(pair.num_samples).split(pair.batch_size)
    requests: list[ViewRequest] = [ViewRequest(indices, 0) for indices in batches]

    def load() -> list[Tensor]:
        return [batch.images.sum() for batch in context.train_loader.stream(requests)]

    load()
    return [Row("JPEGs decoded, cropped and copied: images/s", pair.num_samples / timed(load, context.device))]


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `work` takes on host and device."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
