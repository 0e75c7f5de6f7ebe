"""Compare a student's steps with a bare loop of the same network, and with other precisions and memory formats.

    uv run python benchmarks/student_rate.py [resnet8x4 cnn ...] [--batch-size N] [--steps N] [--rounds N] [--compile]

Each variant is the real training loop that distills the student from stored logits, timed from step to step: images
in their views, targets from the store, learning rate, progress. After each step a bare one of another copy of the
network is timed: forward, cross entropy, KD loss, backward and optimizer on images and targets in memory, without views
or store. Rates are relative to the bare loop's (median over the steps) and to those of float32, contiguous. On one CPU
thread (OMP_NUM_THREADS=1) they are of CPU time, which other programs change less. The images are random: their content
does not change the cost.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

import torch
import torch.nn.functional as F

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.cache_teacher.plan import CacheConfig
from kdpipe.stages.compute.settings import EXACT, ComputeSettings, fast_precisions
from kdpipe.stages.compute.trial import choose
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.distillation.task_builder import build_task
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.runtime.events import ProgressEvent, RunMonitor
from kdpipe.stages.runtime.gpu.device import choose_device
from kdpipe.stages.runtime.memory import disable_malloc_trim
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.set_up import candidates
from kdpipe.stages.views.config import Views

NETWORKS = {
    "resnet8x4": ModelConfig(name="resnet8x4"),
    "resnet32x4": ModelConfig(name="resnet32x4"),
    "cnn": ModelConfig(name="cnn", args={"width": 32}),
}
SHAPE, NUM_CLASSES, T = (3, 32, 32), 100, 4.0
WARM_UP = 2
"""Steps that are not counted: memory grows, kernels are chosen."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet8x4"], help=", ".join(NETWORKS))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="each variant compiled too, which takes minutes")
    arguments = parser.parse_args()
    disable_malloc_trim()  # as the command line does
    for name in arguments.networks:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, Path(folder), arguments)


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> None:
    batch_size, num_steps, num_rounds = arguments.batch_size, arguments.steps, arguments.rounds
    job = make_job(NETWORKS[name], folder, batch_size, WARM_UP + num_steps)
    device = job.task.loader.device
    precisions = ["float32", *fast_precisions(device)]
    variants = [ComputeSettings(one, form) for one in precisions for form in ("contiguous", "channels_last")]
    if arguments.compile:
        variants += [replace(one, compile=True) for one in variants]
    times: dict[ComputeSettings, list[tuple[float, float]]] = {settings: [] for settings in variants}
    for number in range(num_rounds):
        for settings in variants:
            times[settings] += step_times(job, settings, folder / f"job{number}")
    own = {settings: statistics.median(step for step, _ in pairs) for settings, pairs in times.items()}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, batches of {batch_size}, {where}")
    print(f"  {'':<34} {'a step':>10} {'of the bare loop':>17} {'of float32, contiguous':>23}")
    for settings, pairs in times.items():
        ratio = statistics.median(bare / step for step, bare in pairs)
        text = f"{settings.precision}, {settings.memory_format}{', compiled' if settings.compile else ''}"
        print(f"  {text:<34} {1000 * own[settings]:>7.2f} ms {ratio:17.3f} {own[EXACT] / own[settings]:23.2f}")
    auto = choose({one: own[one] for one in candidates(job, device)})
    print(f"  auto takes {auto.precision}, {auto.memory_format} in a training that is worth a trial", flush=True)


def make_job(student: ModelConfig, folder: Path, batch_size: int, num_steps: int) -> TrainJob:
    generator = torch.Generator().manual_seed(0)

    def images(split: str, count: int) -> ImageSet:
        pixels = torch.randint(256, (count, *SHAPE), dtype=torch.uint8, generator=generator)
        labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
        return ImageSet("random", split, pixels, labels, torch.arange(count), tuple(map(str, range(NUM_CLASSES))))

    views = Views(num_views=1, operations=({"name": "RandomCrop", "padding": 4}, {"name": "RandomHorizontalFlip"}))
    train_set = images("train", batch_size * (num_steps + 1))
    context = StageContext(folder, train_set, images("test", 64), views, choose_device("auto"), RunMonitor())
    network = make_network(student, context)
    config, path = StudentConfig(model=student), folder / "store.zarr"
    cache_teacher(CacheConfig(), path, make_network(ModelConfig(name="cnn"), context), [], context)
    task = build_task(network, open_distillation([path], [KD(loss="kd")], config, {}, context), 0, context)
    train_config = TrainConfig(epochs=1, batch_size=batch_size, checkpoint_every_s=1e6)
    return TrainJob("benchmark", "student", network.model, task, None, train_config, 0, JobDir(folder))


def make_network(config: ModelConfig, context: StageContext) -> ModelBundle:
    model = context.build_model(config, seed=0).to(context.device)
    return ModelBundle(model, context.architecture(config), Normalization((0.5,) * 3, (0.25,) * 3))


def step_times(job: TrainJob, settings: ComputeSettings, folder: Path) -> list[tuple[float, float]]:
    """Return the seconds of each step of the training loop and of the bare step after it; none is saved."""
    folder.mkdir(exist_ok=True)
    device = job.task.loader.device
    config = replace(job.config, **settings.to_json())
    bare, times = bare_step(job, settings, device), list[tuple[float, float]]()
    started = now(device)

    def on_event(event: ProgressEvent) -> None:
        nonlocal started
        ended = now(device)
        bare()
        times.append((ended - started, now(device) - ended))
        started = now(device)

    train(replace(job, config=config, job_dir=JobDir(folder)), device, RunMonitor(on_event))
    (folder / "checkpoint.safetensors").unlink()
    return times[WARM_UP:-1]  # the last event is the epoch's


def bare_step(job: TrainJob, settings: ComputeSettings, device: torch.device) -> Callable[[], None]:
    model, config = clone_without_hooks(job.model).train(), job.config
    settings.place(model)
    network = torch.compile(model) if settings.compile else model
    batch = next(job.task.stream(0, config.batch_size, epoch=0, step=0, epochs=1))
    images, labels, targets = settings.place_images(batch.images), batch.hard.labels, batch.teachers[0].logits_at(1.0)
    p_teacher = F.softmax(targets / T, dim=1)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, momentum=0.9, weight_decay=5e-4, fused=device.type == "cuda"
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with settings.active(device):
            logits = network(images).float()
            log_p = F.log_softmax(logits / T, dim=1)
            loss = F.cross_entropy(logits, labels) + T * T * F.kl_div(log_p, p_teacher, reduction="batchmean")
        loss.backward()
        optimizer.step()

    return step


def now(device: torch.device) -> float:
    """Return the time when the device is done; on one CPU thread its own time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()


if __name__ == "__main__":
    main()
