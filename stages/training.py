"""The training loop: teachers, students, pruned and quantized networks all go through this one.

It can be killed at any step. What has no state (order, views, learning rate, dropout: functions of seed, epoch and
step) needs no saving; what has one (weights, optimiser, sums of the epoch's losses, history) is in the checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stages.checkpoint import Machinery, State, restore, save
from stages.errors import NotFiniteError
from stages.evaluate import Evaluation, evaluate
from stages.features import Tap, tapped
from stages.job_folder import JobFolder
from stages.lesson import Batch, Lesson
from stages.optim import TrainConfig, build_optimiser, learning_rate, set_learning_rate
from stages.order import derive_seed, num_steps
from stages.watch import Event, Watch


@dataclass(frozen=True)
class Job:
    """One network to train: on what, how, where, and under which name it reports.

    test: None where there is nothing to measure, as the network does not run to its end: `hints_only` in the lesson.
    `on_epoch` is called with the model and the epoch's number before each epoch, `after_step` with the model after each
    step; whatever they change must be part of the model's state.
    """

    stage: str
    name: str
    model: nn.Module
    lesson: Lesson
    test: Evaluation | None
    config: TrainConfig
    seed: int
    folder: JobFolder
    student_layers: Sequence[str] = ()
    on_epoch: Callable[[nn.Module, int], None] = lambda model, epoch: None
    after_step: Callable[[nn.Module], None] = lambda model: None


def train(job: Job, device: torch.device, watch: Watch) -> list[dict[str, Any]]:
    """Train `job.model` in place, from its checkpoint if there is one; returns the metrics of each epoch.

    Raises StoppedEarly, everything saved, when the stop flag is set; NotFiniteError when the loss is NaN or infinite.
    """
    machinery, state = _set_up(job, device), State()
    if job.folder.checkpoint.exists():
        restore(job.folder.checkpoint, machinery, state)
    steps = num_steps_of(job)
    saved_at = time.monotonic()
    batches = job.lesson.stream(
        job.seed, job.config.batch_size, epoch=state.epoch, step=state.step, epochs=job.config.epochs
    )
    with tapped(job.model, job.student_layers, no_further=job.lesson.hints_only) as student:
        while state.epoch < job.config.epochs:
            started = time.monotonic()
            job.on_epoch(job.model, state.epoch)
            machinery.modules.train()
            while state.step < steps:
                rate = learning_rate(job.config, state.epoch * steps + state.step, steps)
                set_learning_rate(machinery.optimiser, rate)
                _step(job, student, machinery, state, next(batches))
                state.step += 1
                due = time.monotonic() - saved_at >= job.config.checkpoint_every_s
                if due or watch.should_stop():
                    save(job.folder.checkpoint, machinery, state)
                    saved_at = time.monotonic()
                    watch.check()
                watch.report(_event(job, state, steps))
            _end_epoch(job, state, steps, device, time.monotonic() - started)
            watch.report(_event(job, state, steps, state.history[-1]))
    return state.history


def step_walls(job: Job, device: torch.device, num_steps: int) -> list[float]:
    """The seconds that each of a job's first steps takes, targets and pictures read included. Nothing is saved."""
    machinery, state = _set_up(job, device), State()
    epochs = 1 + num_steps // num_steps_of(job)
    batches = job.lesson.stream(job.seed, job.config.batch_size, epoch=0, step=0, epochs=epochs)
    walls = []
    with tapped(job.model, job.student_layers) as student:
        machinery.modules.train()
        for _ in range(num_steps):
            started = time.perf_counter()
            _step(job, student, machinery, state, next(batches))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            walls.append(time.perf_counter() - started)
    return walls


def num_steps_of(job: Job) -> int:
    """The steps of one of its epochs."""
    return num_steps(job.lesson.num_samples, job.config.batch_size)


def _set_up(job: Job, device: torch.device) -> Machinery:
    distillation = job.lesson.distillation or nn.Module()
    modules = nn.ModuleDict({"student": job.model, "distillation": distillation}).to(device)
    optimiser = build_optimiser(job.config, modules.parameters())
    narrow = _narrow_type(job.config, device)
    return Machinery(modules, optimiser, torch.amp.GradScaler(device.type, enabled=narrow is torch.float16))


def _step(job: Job, student: Tap, machinery: Machinery, state: State, batch: Batch) -> None:
    """One batch forward and back, and one step of the optimiser."""
    device = next(job.model.parameters()).device
    narrow = _narrow_type(job.config, device)
    torch.manual_seed(derive_seed(job.seed, "step", state.epoch, state.step))
    twice = job.lesson.needs_input_gradient
    if twice:
        batch.images.requires_grad_()
    # Fused attention has no second derivative.
    kernels = sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()
    with kernels, torch.autocast(device.type, dtype=narrow, enabled=narrow is not None):
        losses = job.lesson.losses(student(batch.images), batch)
    machinery.optimiser.zero_grad(set_to_none=True)
    machinery.scaler.scale(torch.stack(list(losses.values())).sum()).backward()  # type: ignore[no-untyped-call]
    machinery.scaler.step(machinery.optimiser)
    machinery.scaler.update()
    job.after_step(job.model)
    for name, loss in losses.items():
        state.sums[name] = state.sums.get(name, torch.zeros((), device=device)) + loss.detach()


def _end_epoch(job: Job, state: State, steps: int, device: torch.device, wall_s: float) -> None:
    """Evaluate, write the epoch's line down, and stand at the start of the next."""
    losses = {name: float(total) / steps for name, total in state.sums.items()}
    if not all(abs(loss) < float("inf") for loss in losses.values()):
        raise NotFiniteError(
            f"the loss of {job.name} became {losses} in epoch {state.epoch}: lower lr, or lengthen warmup_epochs."
        )
    measured = evaluate(job.model, job.test, device).to_json() if job.test else {}
    line = {"epoch": state.epoch, **measured, "losses": losses, "wall_s": round(wall_s, 3)}
    state.history.append(line)
    state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
    job.folder.write_metrics(state.history)


def _event(job: Job, state: State, steps: int, line: dict[str, Any] | None = None) -> Event:
    done = state.epoch * steps + state.step
    metrics: dict[str, Any] = {key: line[key] for key in ("accuracy", "epoch") if key in line} if line else {}
    return Event(job.stage, job.name, done, job.config.epochs * steps, "step", metrics)


def _narrow_type(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """The narrow type of mixed precision; None where everything runs in float32."""
    if config.precision == "float32" or device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
