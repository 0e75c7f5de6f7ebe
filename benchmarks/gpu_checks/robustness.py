"""Robust: equal bytes, kills, little memory, float16, other jobs on the GPU, and several processes."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from gpu_checks import KDPIPE, Row, Settings, at_least, at_most, holds, kdpipe, write_recipe
from kdpipe.stages.compute.determinism import set_deterministic
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.runtime.events import ProgressEvent, RunMonitor
from kdpipe.stages.runtime.gpu.nvml import list_gpus
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.task import TrainingTask
from kdpipe.stages.views.config import Views

KILLS = (0.6, 0.5)
"""When runs are killed, as shares of the time of a whole one."""

LOCKED = 11
"""The exit code of a job whose GPU is in use."""


def reproducible(settings: Settings) -> Iterator[Row]:
    """Run a recipe twice, and once more with kills: networks and stores have equal bytes."""
    folder = settings.folder("reproducible")
    recipe = write_recipe(settings, folder)
    started = time.monotonic()
    kdpipe("run", recipe, "--run", folder / "one", "--share")
    seconds = time.monotonic() - started
    kdpipe("run", recipe, "--run", folder / "two", "--share")
    one, two = (digests(folder / name) for name in ("one", "two"))
    yield Row("files compared", str(len(one)))
    yield holds("two runs have equal bytes", is_so=bool(one) and one == two)
    kills = run_with_kills(recipe, folder / "killed", [share * seconds for share in KILLS[: settings.size(2, 1)]])
    yield Row("kills", str(kills))
    yield holds("the killed run ends with the same bytes", is_so=one == digests(folder / "killed"))


def run_with_kills(recipe: Path, run: Path, waits: Sequence[float]) -> int:
    """Run the recipe, killed on the way after these seconds, and at last to its end; return how often it was killed."""
    kills = 0
    for wait in waits:
        process = subprocess.Popen(
            [*KDPIPE, "run", str(recipe), "--run", str(run), "--share"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    kdpipe("run", recipe, "--run", run, "--share")
    return kills


def digests(run: Path) -> dict[str, str]:
    """Return the digests of a run's networks and of its stores' shards."""
    files = [*run.rglob("*.safetensors"), *(path for path in run.rglob("c/**/*") if path.is_file())]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def memory(settings: Settings) -> list[Row]:
    """Train and cache where memory is short: both continue in parts. Train in float16 with a scaled loss."""
    device = settings.torch_device
    rows = [_float16(settings)]
    if device.type != "cuda":
        return [*rows, Row("little memory", "only on a GPU")]
    size = 4096
    limit = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, settings.size(1200, 100) * 2**20 / limit), device)
    warnings: list[str] = []
    monitor = RunMonitor(report=lambda event: _keep_warning(event, warnings))
    try:
        history = _train(settings, "memory", TrainConfig(epochs=1, batch_size=size), monitor, num_samples=size)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    divided = [text for text in warnings if "micro-batches" in text]
    return [
        *rows,
        holds("a batch that does not fit is divided", is_so=bool(divided)),
        Row("its warning", divided[0] if divided else "none"),
        holds("the loss is finite", is_so=all(map(math.isfinite, history[-1]["losses"].values()))),
    ]


def _float16(settings: Settings) -> Row:
    if settings.torch_device.type != "cuda":
        return Row("float16", "only on a GPU")
    config = TrainConfig(epochs=2, batch_size=64, precision="float16")
    history = _train(settings, "float16", config, RunMonitor(), num_samples=256)
    losses = [sum(line["losses"].values()) for line in history]
    return holds("float16: the loss is finite and falls", is_so=losses[1] < losses[0] < float("inf"))


def _keep_warning(event: ProgressEvent, warnings: list[str]) -> None:
    if event.unit == "warning":
        warnings.append(event.job)


def compiled(settings: Settings) -> Iterator[Row]:
    """Train with train.compile, on a GPU by CUDA graphs, and without: losses, repeatability and speed."""
    set_deterministic(settings.torch_device)
    config, silent = TrainConfig(epochs=4, batch_size=64, precision="float32"), RunMonitor()
    count = settings.size(2560, 128)
    plain = _train(settings, "plain", config, silent, count)
    first, again = (_train(settings, name, replace(config, compile=True), silent, count) for name in ("first", "again"))
    here, there = (history[0]["losses"]["hard_labels"] for history in (plain, first))
    yield at_most("difference of the first epoch's loss from the plain one", abs(here - there) / here, 1e-3)
    losses, losses_again = ([line["losses"] for line in history] for history in (first, again))
    yield holds("two runs have equal losses", is_so=losses == losses_again)
    ratio = min(line["wall_s"] for line in plain[1:]) / min(line["wall_s"] for line in first[1:])
    yield at_least("resnet8x4, batches of 64: steps/s, of a plain training's", ratio, 1.0)


def _train(
    settings: Settings, name: str, config: TrainConfig, monitor: RunMonitor, num_samples: int
) -> list[dict[str, Any]]:
    """Train resnet8x4, with dropout, on random images with hard labels; return the history."""
    generator = torch.Generator().manual_seed(0)
    side = settings.size(32, 8)
    pixels = torch.randint(256, (num_samples, 3, side, side), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (num_samples,), generator=generator)
    images = ImageSet("random", "train", pixels, labels, torch.arange(num_samples), tuple(map(str, range(10))))
    folder = settings.folder(name)
    context = StageContext(folder, images, images, Views(num_views=1), settings.torch_device, monitor)
    network = context.build_model(ModelConfig(name="cnn" if settings.toy else "resnet8x4"), seed=0)
    model = nn.Sequential(network, nn.Dropout(0.1)).to(context.device)
    task = TrainingTask(context.train_loader, 1, Normalization((0.5,) * 3, (0.25,) * 3))
    (folder / "job").mkdir()
    return train(TrainJob("check", name, model, task, None, config, 0, JobDir(folder / "job")), context.device, monitor)


def second_job(settings: Settings) -> list[Row]:
    """Start a job on a GPU that another one uses: it is refused, and with --share both run."""
    if settings.torch_device.type != "cuda" or not list_gpus():
        return [Row("a second job", "only on a GPU with NVML")]
    folder = settings.folder("second_job")
    device = "cuda:0" if settings.device == "cuda" else settings.device  # where there are others, the same
    recipe = write_recipe(settings, folder, device=device)
    held = "import time; from kdpipe.stages.runtime.gpu.device import select_device; import torch; "
    held += (
        f"one = torch.ones(1, device=select_device({device!r}, share=True, warn=print)); print('ready', flush=True); "
    )
    first = subprocess.Popen([sys.executable, "-c", held + "time.sleep(120)"], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        while "ready" not in first.stdout.readline():
            if first.poll() is not None:
                raise RuntimeError("the first job ended early")
        refused = kdpipe("train-teacher", recipe, "--run", folder / "refused", expect=None)
        shared = kdpipe("train-teacher", recipe, "--run", folder / "shared", "--share", expect=None)
    finally:
        first.kill()
        first.wait()
    last = (refused.stderr.strip() or "nothing").splitlines()[-1]
    return [
        Row("a second job: exit code", str(refused.returncode), str(LOCKED), refused.returncode == LOCKED),
        Row("its message", last[:300]),
        holds("with --share it runs", is_so=shared.returncode == 0),
    ]


def two_ranks(settings: Settings) -> list[Row]:
    """Train with two processes, on two GPUs over NCCL or on one over gloo, and compare with one process."""
    folder = settings.folder("two_ranks")
    recipe = write_recipe(settings, folder)
    # Mixed precision would enlarge the rounding of sums in another order, step by step.
    recipe.write_text(recipe.read_text().replace("batch_size = 64", 'batch_size = 64, precision = "float32"'))
    kdpipe("train-teacher", recipe, "--run", folder / "one", "--share")
    num_gpus = torch.cuda.device_count() if settings.torch_device.type == "cuda" else 0
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if num_gpus == 1:
        environment["KDPIPE_DIST_BACKEND"] = "gloo"
    launcher = "import sys; from kdpipe.pipeline.session.torchrun import launch; sys.exit(launch(sys.argv[1:]))"
    path = folder / "kdpipe_main.py"
    path.write_text("from kdpipe.pipeline.entry import main\n\nmain()\n")
    command = [sys.executable, "-c", launcher, "--nproc-per-node", "2", "--standalone", str(path)]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "train-teacher", str(recipe), "--run", str(folder / "two"), "--share"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    one, two = (load_file(next((folder / name / "teacher").glob("*.safetensors"))) for name in ("one", "two"))
    error = max(float((one[key] - two[key]).abs().max() / one[key].abs().max().clamp(min=1e-3)) for key in one)
    return [
        Row("two ranks", "NCCL" if num_gpus > 1 else "gloo"),
        Row("seconds", time.monotonic() - started),
        at_most("largest difference of a weight from one process's, over the tensor's largest", error, 0.05),
    ]
