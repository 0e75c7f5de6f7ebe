"""The training loop of all networks: teachers, students, pruned and quantized ones.

It can be killed at any step. Order, views, learning rate and dropout are functions of seed, epoch and step; everything
else (weights, optimizer, sums of the epoch's losses, history) is in the checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from kdpipe.stages.compute.settings import EXACT
from kdpipe.stages.compute.tf32 import tf32
from kdpipe.stages.compute.threads import restored_threads
from kdpipe.stages.data.splits import VALIDATION
from kdpipe.stages.errors import NotFiniteError, RunError, StoppedEarly
from kdpipe.stages.evaluation.main_metric import metric_of
from kdpipe.stages.models.hooks import extract_features
from kdpipe.stages.runtime.circumstances import circumstances, resume_circumstances
from kdpipe.stages.runtime.events import ProgressEvent, RunMonitor
from kdpipe.stages.runtime.sync_batch_norm import batch_norm_over_processes
from kdpipe.stages.training.callbacks import Hooks, callbacks_of
from kdpipe.stages.training.checkpoint import Progress, TrainState, circumstances_of, load_checkpoint, save_checkpoint
from kdpipe.stages.training.class_balance import with_class_balance
from kdpipe.stages.training.job import TrainJob, num_steps_of
from kdpipe.stages.training.optim import build_schedule, learning_rate, set_learning_rate
from kdpipe.stages.training.optimization.averaging import evaluated_weights, use_evaluated_weights
from kdpipe.stages.training.set_up import candidates, chosen_settings, compile_key, resumed_settings, set_up
from kdpipe.stages.training.step import TrainStep
from kdpipe.stages.training.task import Batch


@restored_threads()
def train(job: TrainJob, device: torch.device, monitor: RunMonitor) -> list[dict[str, Any]]:
    """Train `job.model` in place, resuming from its checkpoint if there is one.

    The final checkpoint is kept until the network is finalized, which takes time and may be interrupted. Several
    processes stop, and save, at the same step, and end with the same weights.

    Returns the metrics of each epoch. Raises StoppedEarly, with everything saved, when the stop flag is set;
    NotFiniteError if the loss is NaN or infinite; RecipeError if the processes cannot share a batch equally.
    """
    job, process_group = with_class_balance(job), job.process_group
    process_group.require_shares(job.config.batch_size, job.task.num_samples)
    steps, (state, progress, batches) = num_steps_of(job), _begin(job, device, monitor)
    if job.test is not None:
        job = replace(job, test=replace(job.test, compute=state.settings))
    with (
        callbacks_of(job, progress, monitor) as hooks,
        batch_norm_over_processes(state.modules, twice_differentiable=job.task.needs_input_gradient),
        extract_features(
            job.model, job.student_layers, no_further=job.task.hints_only, compile_key=compile_key(job, device, monitor)
        ) as student,
        tf32(enabled=state.settings.precision == "tf32"),
    ):
        last_save = time.monotonic()
        while not _is_over(job, progress):
            started = time.monotonic()
            job.on_epoch(job.model, progress.epoch)
            state.modules.train()
            train_step = TrainStep(job, student, state, progress, monitor)
            last_save = _run_steps(job, train_step, batches, monitor, hooks=hooks, last_save=last_save)
            try:
                with evaluated_weights(state.optimizer, state.average):
                    _end_epoch(job, progress, steps, device, time.monotonic() - started)
                    hooks.call("on_epoch_end")
            except StoppedEarly:  # during evaluation: all steps of the epoch, and its sums, are complete
                _save(job, state, progress, hooks)
                raise
            _save_if_over(job, state, progress, hooks, monitor)
            monitor.report(_event(job, progress, steps, progress.history[-1]))
        use_evaluated_weights(state.optimizer, state.average)
    state.optimizer.zero_grad()  # those of a CUDA graph lie in memory that the next one overwrites
    if state.settings.memory_format == "channels_last":
        job.model.to(memory_format=torch.contiguous_format)
    return progress.history


def _begin(job: TrainJob, device: torch.device, monitor: RunMonitor) -> tuple[TrainState, Progress, Iterator[Batch]]:
    """Return a job's objects, its position and its batches from there on, after its checkpoint if there is one."""
    progress, checkpoint = Progress(), job.job_dir.checkpoint
    if not job.process_group.broadcast_object(checkpoint.exists()):
        settings, batches = chosen_settings(job, device, _stream(job, progress, job.config.epochs), monitor)
        return set_up(job, device, settings), progress, batches
    state = set_up(job, device, resumed_settings(circumstances_of(checkpoint), job, device, monitor))
    load_checkpoint(checkpoint, state, progress)
    _require_position(job, progress, num_steps_of(job))
    resume_circumstances(progress.made_with, job.name, device, job.process_group, monitor)
    return state, progress, _stream(job, progress, job.config.epochs)


def _is_over(job: TrainJob, progress: Progress) -> bool:
    """Return whether all epochs are trained, or a callback ended the training."""
    return progress.epoch >= job.config.epochs or any("stopped_by" in line for line in progress.history[-1:])


def _save_if_over(job: TrainJob, state: TrainState, progress: Progress, hooks: Hooks, monitor: RunMonitor) -> None:
    """Write the checkpoint after the last epoch; its metrics say which callback ended the training, if one did."""
    if progress.stopped_by and progress.epoch < job.config.epochs:
        progress.history[-1]["stopped_by"] = progress.stopped_by
        job.process_group.on_main(lambda: job.job_dir.write_metrics(progress.history))
        if not job.validates:
            monitor.warn_once(
                job.stage,
                f"the callback {progress.stopped_by} ended a training early: if it looked at the accuracy, that was on "
                "the test images, which then show the network too good; set data.validation_share.",
            )
    if _is_over(job, progress):
        _save(job, state, progress, hooks)


def _save(job: TrainJob, state: TrainState, progress: Progress, hooks: Hooks) -> None:
    """Write the checkpoint in the first process."""

    def save() -> None:
        progress.callbacks = hooks.states()
        device = next(state.modules.parameters()).device
        progress.made_with = circumstances(device, job.process_group) | {"compute": state.settings.to_json()}
        save_checkpoint(job.job_dir.checkpoint, state, progress)

    job.process_group.on_main(save)
    hooks.call("on_checkpoint")


def _run_steps(
    job: TrainJob,
    train_step: TrainStep,
    batches: Iterator[Batch],
    monitor: RunMonitor,
    *,
    hooks: Hooks,
    last_save: float,
) -> float:
    """Run the rest of an epoch's steps, saving at intervals; returns the time of the last save."""
    state, progress, process_group, steps = train_step.state, train_step.progress, job.process_group, num_steps_of(job)
    rate = build_schedule(job.config, steps)
    while progress.step < steps:
        set_learning_rate(state.optimizer, rate(progress.epoch * steps + progress.step))
        train_step.step(next(batches))
        progress.step += 1
        hooks.call("on_step_end")
        due = time.monotonic() - last_save >= job.config.checkpoint_every_s
        stop, due = process_group.sync_flags(monitor.should_stop(), due)
        if due or stop:
            _save(job, state, progress, hooks)
            last_save = time.monotonic()
        if stop:
            raise StoppedEarly
        monitor.report(_event(job, progress, steps))
    return last_save


def _require_position(job: TrainJob, progress: Progress, steps: int) -> None:
    """Raise RunError for a checkpoint at a position that the job does not have."""
    within = progress.epoch <= job.config.epochs and progress.step <= steps
    if not within or (job.test and any(metric_of(line).name not in line for line in progress.history)):
        raise RunError(
            f"{job.job_dir.checkpoint} does not fit this job (epoch {progress.epoch}, step {progress.step} of "
            f"{steps}): delete it to restart the job."
        )


def time_steps(job: TrainJob, device: torch.device, num_steps: int) -> list[float]:
    """Return the seconds of each of a job's first steps, including reading of targets and images. Nothing is saved."""
    job = with_class_balance(job)
    state = set_up(job, device, candidates(job, device)[0])
    progress = Progress()
    batches = _stream(job, progress, 1 + num_steps // num_steps_of(job))
    times = []
    with (
        batch_norm_over_processes(state.modules, twice_differentiable=job.task.needs_input_gradient),
        extract_features(job.model, job.student_layers) as student,
    ):
        state.modules.train()
        train_step = TrainStep(job, student, state, progress, RunMonitor())
        for _ in range(num_steps):
            started = time.perf_counter()
            train_step.step(next(batches))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    return times


def _stream(job: TrainJob, progress: Progress, epochs: int) -> Iterator[Batch]:
    """Yield the batches from the job's position on."""
    size, process_group = job.config.batch_size, job.process_group
    return job.task.stream(
        job.seed, size, epoch=progress.epoch, step=progress.step, epochs=epochs, process_group=process_group
    )


def _end_epoch(job: TrainJob, progress: Progress, steps: int, device: torch.device, wall_s: float) -> None:
    """Evaluate, write the epoch's metrics, and move to the start of the next epoch."""
    losses = {name: float(total) / steps for name, total in progress.sums.items()}
    if not all(abs(loss) < float("inf") for loss in losses.values()):
        raise NotFiniteError(
            f"the loss of {job.name} diverged in epoch {progress.epoch} ({losses}): try a lower lr or more "
            "warmup_epochs."
        )

    def evaluate_and_write() -> dict[str, Any]:
        result = job.evaluate(job.model, job.test, device).to_json() if job.test else {}
        rate = learning_rate(job.config, progress.epoch * steps + steps - 1, steps)
        compute = {"compute": job.test.compute.to_json()} if job.test and job.test.compute != EXACT else {}
        line = {"epoch": progress.epoch, **result, "losses": losses, "lr": rate, "wall_s": round(wall_s, 3), **compute}
        line |= {"split": VALIDATION} if job.validates else {}
        job.job_dir.write_metrics([*progress.history, line])
        return line

    progress.history.append(job.process_group.on_main(evaluate_and_write))
    progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}


def _event(job: TrainJob, progress: Progress, steps: int, line: dict[str, Any] | None = None) -> ProgressEvent:
    """Return the job's position as an event, with the metrics of an epoch at its end."""
    done = progress.epoch * steps + progress.step
    total = done if line and _is_over(job, progress) else job.config.epochs * steps
    return ProgressEvent(job.stage, job.name, done, total, "step", line or {})
