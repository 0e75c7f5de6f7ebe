"""Right numbers: stores, views and losses against the CPU, a teacher given by its weights, and INT8."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor

import kdpipe as kd
from gpu_checks import Row, Settings, at_least, at_most, holds, kdpipe, write_recipe
from kdpipe.pipeline import steps
from kdpipe.stages.cache_teacher.plan import CacheConfig
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.loader.image_loader import ViewRequest
from kdpipe.stages.data.tasks import CLASSIFICATION
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.distillation.task_builder import build_student, build_task, student_shapes
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.distillation import required_of, student_layers
from kdpipe.stages.losses.registry import LOSSES
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.hooks import extract_features
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.teacher import TeacherConfig, load_teacher
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import time_steps
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.views.config import Views

CPU = torch.device("cpu")

OPERATIONS = (
    {"name": "RandomCrop", "padding": 1},
    {"name": "RandomAffine", "degrees": 20.0, "translate": [0.1, 0.1]},
    {"name": "ColorJitter", "brightness": 0.3, "contrast": 0.3},
)


def parity(settings: Settings) -> list[Row]:
    """Compare stores in float32 and as `auto` computes them with the CPU's in float32, and the pixels of views."""
    train, test = kd.load_dataset("digits")
    folder = settings.folder("parity")
    epochs = settings.size(10, 1)
    teacher = kd.train_teacher(
        kd.create_model("cnn", train, width=16), train, test=test, epochs=epochs, device="cpu", run=folder / "teacher"
    )
    views = kd.Views(num_views=2, operations=OPERATIONS)

    def store(name: str, device: str, precision: str) -> kd.TargetStore:
        path = folder / f"{name}.zarr"
        return kd.cache_teacher(
            teacher, train, path, views=views, features=["stage2"], device=device, precision=precision, dtype="float32"
        )

    exact = store("cpu", "cpu", "float32")
    found = {name: store(name, settings.device, name) for name in ("float32", "auto")}
    rows = [view_parity(settings, train, views)]
    for name, limit in (("float32", 1e-4), ("auto", 0.05)):
        for array in exact.arrays:
            error = max(_error(found[name], exact, array.name, view) for view in range(2))
            rows.append(at_most(f"{name}: largest error of {array.name} over its largest value", error, limit))
        logits = [np.concatenate([one.read_view("logits", view) for view in range(2)]) for one in (exact, found[name])]
        rows.append(at_most(f"{name}: KL from the CPU's logits, nats", _kl(*map(torch.from_numpy, logits)), 1e-4))
    return rows


def view_parity(settings: Settings, train: kd.ImageSet, views: Views) -> Row:
    """Compare views rendered on the device with the CPU's."""
    request = ViewRequest(torch.arange(256), 1)
    here, there = (
        StageContext(settings.out, train, train, views, device, RunMonitor()).train_loader.get(request).images
        for device in (CPU, settings.torch_device)
    )
    return at_most("views: largest difference in gray levels", float((here.int() - there.cpu().int()).abs().max()), 1)


def given_teacher(settings: Settings) -> list[Row]:
    """Run the pipeline with a teacher that is given by its weights."""
    folder = settings.folder("given_teacher")
    trained = write_recipe(settings, folder)
    kdpipe("train-teacher", trained, "--run", folder / "first", "--share")
    weights = next((folder / "first" / "teacher").glob("*.safetensors"))
    text = trained.read_text()
    given = folder / "given.toml"
    start = text.index("train = {")
    model = f'model = {{ name = "cnn", args = {{ width = 16 }}, weights = "{weights}" }}'
    given.write_text(
        text[:start].replace('model = { name = "cnn", args = { width = 16 } }', model)
        + "mean = [0.5]\nstd = [0.5]\nexpected_accuracy = 0\n"
        + text[text.index("[student]") :]
    )
    for command in ("train-teacher", "cache-teacher", "train-student"):
        kdpipe(command, given, "--run", folder / "second", "--share")
    return [holds("a run with a given teacher ends", is_so=any((folder / "second" / "students").iterdir()))]


def losses(settings: Settings) -> Iterator[Row]:
    """Compare each loss's first step with the CPU's, and count synchronizations of the host in later steps."""
    folder = settings.folder("losses")
    kinds = {name: kind for name, kind in LOSSES.builtin.items() if CLASSIFICATION in kind.tasks}
    configs = {name: _example(kind) for name, kind in kinds.items()}
    on_cpu, on_device = (_context(folder, device) for device in (CPU, settings.torch_device))
    student = StudentConfig(model=ModelConfig(name="cnn_average", args={"width": 8}), seeds=(0,))
    _fill_store(folder, list(configs.values()), student, on_cpu)
    for name, config in configs.items():
        here, there = (_first_loss(config, student, context, folder) for context in (on_cpu, on_device))
        error = abs(here - there) / max(abs(here), 1e-6)
        yield at_most(f"{name}: difference from the CPU's loss", error, 2e-3)
        if settings.torch_device.type == "cuda":
            count = _synchronizations(config, student, on_device, folder / name)
            yield at_most(f"{name}: synchronizations a step", count, 0)


def qat(settings: Settings) -> list[Row]:
    """Prune and quantize on the device: the INT8 file, computed by onnxruntime on the CPU, agrees with torch."""
    train, test = kd.load_dataset("digits")
    folder = settings.folder("qat")
    device: Any = {"device": settings.device, "progress": False}
    options: Any = {"test": test, "epochs": settings.size(6, 1), **device}
    network = kd.create_model("cnn", train, width=16)
    teacher = kd.train_teacher(network, train, run=folder / "teacher", **options)
    store = kd.cache_teacher(teacher, train, folder / "store.zarr", **device)
    student = kd.train_student("cnn", train, store, run=folder / "student", **options)
    tune: Any = {"epochs": settings.size(3, 1)}
    small = kd.compress(student, prune_train=tune, quantize_train=tune, baselines=False, **device)
    agreement = small.networks["int8"].figures["onnx_agreement"]
    return [at_least("INT8: predicts torch's class", float(agreement), 0.99)]


def _error(one: kd.TargetStore, other: kd.TargetStore, name: str, view: int) -> float:
    found, expected = (store.read_view(name, view).astype(np.float64) for store in (one, other))
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))


def _kl(expected: Tensor, found: Tensor) -> float:
    log_p, log_q = (torch.log_softmax(logits.double(), 1) for logits in (expected, found))
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


def _example(kind: type[Loss]) -> Loss:
    """Return a loss on the second stage of both networks, if it takes layers."""
    layers: Any = {"layers": (("stage2", "stage2"),)} if "layers" in get_type_hints(kind) else {}
    return kind(loss=kind.loss, **layers)


def _context(folder: Path, device: torch.device) -> StageContext:
    train, test = kd.load_dataset("digits")
    views = Views(num_views=1, operations=({"name": "RandomCrop", "padding": 1},))
    return StageContext(folder, train, test, views, device, RunMonitor())


def _fill_store(folder: Path, configs: Sequence[Loss], student: StudentConfig, context: StageContext) -> None:
    """Train a teacher for one epoch on the CPU, and cache what all losses need."""
    config = TeacherConfig(
        model=ModelConfig(name="cnn_average", args={"width": 16}), train=TrainConfig(epochs=1), export=False
    )
    steps.train_teacher(config, 0, context)
    teacher = load_teacher(config, 0, context)
    features = required_of(configs, student_shapes(student, configs, context), 0)
    steps.cache_teacher(CacheConfig(dtype="float32"), folder / "store.zarr", teacher, features, context)


def _job(config: Loss, student: StudentConfig, context: StageContext, store: Path, folder: Path) -> TrainJob:
    spec = open_distillation([store], [config], student, {}, context)
    network = build_student(student, 0, context, spec)
    network.model.to(context.device)
    task = build_task(network, spec, 0, context)
    folder.mkdir(parents=True, exist_ok=True)
    train = TrainConfig(batch_size=64, precision="float32")
    return TrainJob("check", config.loss, network.model, task, None, train, 0, JobDir(folder), student_layers([config]))


def _first_loss(config: Loss, student: StudentConfig, context: StageContext, folder: Path) -> float:
    """Return the sum of the losses of a training's first batch."""
    job = _job(config, student, context, folder / "store.zarr", folder / config.loss)
    task = job.task
    assert task.distillation is not None
    task.distillation.to(context.device)
    batch = next(task.stream(0, 64, epoch=0, step=0, epochs=1))
    if task.needs_input_gradient:
        batch = replace(batch, images=batch.images.requires_grad_())
    job.model.train()
    with extract_features(job.model, job.student_layers) as extractor:
        return float(sum(loss.detach().double() for loss in task.losses(extractor(batch.images), batch).values()))


def _synchronizations(config: Loss, student: StudentConfig, context: StageContext, folder: Path) -> float:
    """Return how often a step waits for the device, by torch's sync-debug mode, over four steps after the first two."""
    counts = []
    for num_steps in (2, 6):
        job = _job(config, student, context, folder.parent / "store.zarr", folder)
        with _recorded() as found:
            time_steps(job, context.device, num_steps)
        counts.append(sum("synchroniz" in str(warning.message).lower() for warning in found))
    return (counts[1] - counts[0]) / 4


@contextmanager
def _recorded() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
