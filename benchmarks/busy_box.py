"""Compare the default number of CPU threads with the best fixed one, alone and beside busy processes.

    uv run python benchmarks/busy_box.py [views] [step] [pass] [--neighbors 0 1 2] [--rounds N]

Each setting (default, one thread, all cores) works in a process of its own, started beside the neighbors, one after the
other: the views of a data set in memory, the steps of a student (resnet8x4), and a teacher's pass with storing
(resnet32x4). They work in turn, for seconds each, and the result is the median over the rounds of the ratio of the
default's rate to that of the best fixed number; the neighbors multiply matrices on one thread each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

import torch

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.cache_teacher.plan import CacheConfig
from kdpipe.stages.compute.threads import set_up_threads
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.loader.image_loader import ViewRequest
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.runtime.cpu import num_cores
from kdpipe.stages.runtime.events import ProgressEvent, RunMonitor
from kdpipe.stages.runtime.memory import disable_malloc_trim
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.task import TrainingTask
from kdpipe.stages.views.config import Views

BATCH_SIZE, NUM_IMAGES, SHAPE = 64, 50_000, (3, 32, 32)
NORMALIZE = Normalization((0.5,) * 3, (0.25,) * 3)
OPERATIONS = ({"name": "RandomCrop", "padding": 4}, {"name": "RandomHorizontalFlip"})
TARGET, TURN_S = 0.9, {"views": 1.0, "step": 2.0, "pass": 2.0}

NEIGHBOR = "import numpy as np\na = np.eye(256)\nwhile True: a = a @ a"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--neighbors", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", nargs=2, metavar=("KIND", "THREADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work)
        return
    settings = ["default", "1", str(num_cores())]
    print(f"{num_cores()} CPU cores, torch {torch.__version__}, images/s, medians of {arguments.rounds} turns\n")
    print(f"| work | neighbors | default | 1 thread | {num_cores()} threads | ratio to the best | target |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for kind in arguments.kinds:
        for num_neighbors in arguments.neighbors:
            with neighbors(num_neighbors):
                rates = in_turn(kind, settings, arguments.rounds)
            medians = {setting: statistics.median(own) for setting, own in rates.items()}
            best = max(settings[1:], key=medians.__getitem__)
            ratio = statistics.median(own / other for own, other in zip(rates["default"], rates[best], strict=True))
            row = [kind, num_neighbors, *(f"{medians[setting]:,.0f}" for setting in settings), f"{ratio:.2f}"]
            print("|", " | ".join(map(str, row)), f"| {TARGET} {'met' if ratio >= TARGET else 'NOT met'} |", flush=True)


@contextmanager
def neighbors(count: int) -> Iterator[None]:
    environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    busy = [subprocess.Popen([sys.executable, "-c", NEIGHBOR], env=environ) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def in_turn(kind: str, settings: list[str], num_rounds: int) -> dict[str, list[float]]:
    """Return the rates of each setting, which wait for each other."""
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    processes: dict[str, subprocess.Popen[str]] = {}
    rates: dict[str, list[float]] = {setting: [] for setting in settings}
    try:
        for setting in settings:
            command = [sys.executable, __file__, "--work", kind, setting]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            processes[setting] = subprocess.Popen(command, text=True, env=environ, **pipes)
            turn(processes[setting])  # starts, has its trials, and warms up
        for _ in range(num_rounds):
            for setting, process in processes.items():
                rates[setting].append(turn(process))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return rates


def turn(process: subprocess.Popen[str]) -> float:
    """Let a process work for a turn, and return its rate."""
    assert process.stdin is not None and process.stdout is not None
    print("go", file=process.stdin, flush=True)
    return float(process.stdout.readline())


class Turns:
    """Works for TURN_S of its kind of work, then reports the rate and waits for its next turn; called once a batch."""

    def __init__(self, kind: str, batch_size: int) -> None:
        self._seconds, self._batch_size, self._num_batches, self._started = TURN_S[kind], batch_size, 0, 0.0
        self._in_trial = kind == "pass"

    def end_trial(self, event: ProgressEvent) -> None:
        self._in_trial = self._in_trial and event.unit != "trial"

    def __call__(self) -> bool:
        if self._in_trial:
            return False
        passed = time.perf_counter() - self._started
        if not self._started:
            sys.stdin.readline()
            self._started = time.perf_counter()
        elif passed >= self._seconds and self._num_batches:
            print(self._num_batches * self._batch_size / passed, flush=True)
            sys.stdin.readline()
            self._started, self._num_batches = time.perf_counter(), 0
        self._num_batches += 1
        return False


def work(kind: str, setting: str) -> None:
    disable_malloc_trim()  # as the command line does
    set_up_threads(None if setting == "default" else int(setting))
    with tempfile.TemporaryDirectory() as folder:
        KINDS[kind](Path(folder))


def views(folder: Path) -> None:
    turns = Turns("views", BATCH_SIZE)
    loader = make_context(folder, turns).train_loader
    for view in range(sys.maxsize):
        for _ in loader.stream(ViewRequest(rows, view) for rows in torch.arange(NUM_IMAGES).split(BATCH_SIZE)):
            turns()


def step(folder: Path) -> None:
    context = make_context(folder, Turns("step", BATCH_SIZE))
    task = TrainingTask(context.train_loader, 1, NORMALIZE)
    config = TrainConfig(epochs=300, batch_size=BATCH_SIZE, lr=0.01)
    model = context.build_model(ModelConfig(name="resnet8x4"), 0)
    job = TrainJob("train-student", "student", model, task, None, config, 0, JobDir(folder))
    train(job, context.device, context.monitor)


def teachers_pass(folder: Path) -> None:
    config = CacheConfig(batch_size=256)
    context = make_context(folder, Turns("pass", 256))
    chosen = ModelConfig(name="resnet32x4")
    teacher = ModelBundle(context.build_model(chosen, 0).eval(), context.architecture(chosen), NORMALIZE)
    cache_teacher(config, folder / "store.zarr", teacher, [], context)


def make_context(folder: Path, turns: Turns) -> StageContext:
    images = torch.randint(256, (NUM_IMAGES, *SHAPE), dtype=torch.uint8)
    classes = tuple(map(str, range(10)))
    labels, ids = torch.arange(NUM_IMAGES) % len(classes), torch.arange(NUM_IMAGES)
    image_set = ImageSet("random", "train", images, labels, ids, classes)
    monitor = RunMonitor(turns.end_trial, turns)
    return StageContext(folder, image_set, image_set, Views(operations=OPERATIONS), torch.device("cpu"), monitor)


KINDS = {"views": views, "step": step, "pass": teachers_pass}


if __name__ == "__main__":
    main()
