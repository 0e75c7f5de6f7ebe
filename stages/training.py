"""The training loop: teachers, students, pruned and quantized networks all go through this one.

It can be killed at any step. What has no state (order, views, learning rate, dropout: functions of seed, epoch and
step) needs no saving; what has one (weights, optimizer, sums of the epoch's losses, history) is in the checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stages.checkpoint import Machinery, State, restore, save
from stages.errors import NotFiniteError, RunError, StoppedEarly
from stages.evaluate import Evaluation, evaluate
from stages.features import tapped
from stages.global_batch_norm import batch_norm_over_processes
from stages.job_folder import JobFolder
from stages.lesson import Batch, Lesson
from stages.optim import TrainConfig, build_optimizer, learning_rate, set_learning_rate
from stages.order import num_steps
from stages.processes import ONE, Processes
from stages.step import Stepper, narrow_type
from stages.watch import Event, Watch


@dataclass(frozen=True)
class Job:
    """One network to train: on what, how, where, and under which name it reports.

    test: None where there is nothing to measure, as the network does not run to its end: `hints_only` in the lesson.
    `on_epoch` is called with the model and the epoch's number before each epoch, `after_step` with the model after each
    step; whatever they change must be part of the model's state. processes: who share each batch.
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
    processes: Processes = ONE


def train(job: Job, device: torch.device, watch: Watch) -> list[dict[str, Any]]:
    """Train `job.model` in place, from its checkpoint if there is one; returns the metrics of each epoch.

    The checkpoint of the end is left to whoever makes something of the network, which takes time and may be stopped.
    Several processes stop, and save, at the same step, and end with the same weights. Raises StoppedEarly, everything
    saved, when the stop flag is set; NotFiniteError when the loss is NaN or infinite; RecipeError where the processes
    cannot share a batch.
    """
    processes = job.processes
    processes.require_shares(job.config.batch_size, job.lesson.num_samples)
    machinery, state = _set_up(job, device), State()
    steps = num_steps_of(job)
    if processes.share(job.folder.checkpoint.exists()):
        restore(job.folder.checkpoint, machinery, state)
        _require_place(job, state, steps)
    saved_at = time.monotonic()
    batches = _stream(job, state, job.config.epochs)
    with (
        batch_norm_over_processes(machinery.modules),
        tapped(job.model, job.student_layers, no_further=job.lesson.hints_only) as student,
    ):
        while state.epoch < job.config.epochs:
            started = time.monotonic()
            job.on_epoch(job.model, state.epoch)
            machinery.modules.train()
            stepper = Stepper(job, student, machinery, state, watch)
            while state.step < steps:
                rate = learning_rate(job.config, state.epoch * steps + state.step, steps)
                set_learning_rate(machinery.optimizer, rate)
                stepper.step(next(batches))
                state.step += 1
                due = time.monotonic() - saved_at >= job.config.checkpoint_every_s
                stop, due = processes.agree(watch.should_stop(), due)
                if due or stop:
                    processes.once(lambda: save(job.folder.checkpoint, machinery, state))
                    saved_at = time.monotonic()
                if stop:
                    raise StoppedEarly
                watch.report(_event(job, state, steps))
            try:
                _end_epoch(job, state, steps, device, time.monotonic() - started)
            except StoppedEarly:  # in the midst of the test set: all steps of the epoch are done, and its sums there
                save(job.folder.checkpoint, machinery, state)
                raise
            if state.epoch == job.config.epochs:
                processes.once(lambda: save(job.folder.checkpoint, machinery, state))
            watch.report(_event(job, state, steps, state.history[-1]))
    return state.history


def _require_place(job: Job, state: State, steps: int) -> None:
    """Raise RunError for a checkpoint that says that the job is where it cannot be."""
    within = state.epoch <= job.config.epochs and state.step <= steps
    if not within or (job.test and any("accuracy" not in line for line in state.history)):
        raise RunError(
            f"{job.folder.checkpoint} does not fit this job (epoch {state.epoch}, step {state.step} of {steps}): "
            "delete it to start the job afresh."
        )


def step_walls(job: Job, device: torch.device, num_steps: int) -> list[float]:
    """The seconds that each of a job's first steps takes, targets and pictures read included. Nothing is saved."""
    machinery, state = _set_up(job, device), State()
    batches = _stream(job, state, 1 + num_steps // num_steps_of(job))
    walls = []
    with batch_norm_over_processes(machinery.modules), tapped(job.model, job.student_layers) as student:
        machinery.modules.train()
        stepper = Stepper(job, student, machinery, state, Watch())
        for _ in range(num_steps):
            started = time.perf_counter()
            stepper.step(next(batches))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            walls.append(time.perf_counter() - started)
    return walls


def _stream(job: Job, state: State, epochs: int) -> Iterator[Batch]:
    """The batches from where the job stands."""
    size, processes = job.config.batch_size, job.processes
    return job.lesson.stream(job.seed, size, epoch=state.epoch, step=state.step, epochs=epochs, processes=processes)


def num_steps_of(job: Job) -> int:
    """The steps of one of its epochs."""
    return num_steps(job.lesson.num_samples, job.config.batch_size)


def _set_up(job: Job, device: torch.device) -> Machinery:
    job.processes.use(device)
    distillation = job.lesson.distillation or nn.Module()
    modules = nn.ModuleDict({"student": job.model, "distillation": distillation}).to(device)
    optimizer = build_optimizer(job.config, modules.parameters())
    narrow = narrow_type(job.config, device)
    return Machinery(modules, optimizer, torch.amp.GradScaler(device.type, enabled=narrow is torch.float16))


def _end_epoch(job: Job, state: State, steps: int, device: torch.device, wall_s: float) -> None:
    """Evaluate, write the epoch's line down, and stand at the start of the next."""
    losses = {name: float(total) / steps for name, total in state.sums.items()}
    if not all(abs(loss) < float("inf") for loss in losses.values()):
        raise NotFiniteError(
            f"the loss of {job.name} became {losses} in epoch {state.epoch}: lower lr, or lengthen warmup_epochs."
        )

    def close() -> dict[str, Any]:
        measured = evaluate(job.model, job.test, device).to_json() if job.test else {}
        rate = learning_rate(job.config, state.epoch * steps + steps - 1, steps)
        line = {"epoch": state.epoch, **measured, "losses": losses, "lr": rate, "wall_s": round(wall_s, 3)}
        job.folder.write_metrics([*state.history, line])
        return line

    state.history.append(job.processes.once(close))
    state.epoch, state.step, state.sums = state.epoch + 1, 0, {}


def _event(job: Job, state: State, steps: int, line: dict[str, Any] | None = None) -> Event:
    """Where the job is; with the figures of an epoch where one has ended."""
    done = state.epoch * steps + state.step
    return Event(job.stage, job.name, done, job.config.epochs * steps, "step", line or {})
