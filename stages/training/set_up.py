"""How a job's steps are computed, and the objects that they change: network, optimizer, loss scaler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from kdpipe.stages.compute.compiled import require_compiler
from kdpipe.stages.compute.settings import EXACT, ComputeSettings, MemoryFormat, Precision, fast_precisions
from kdpipe.stages.compute.threads import fastest_count, max_threads, open_counts
from kdpipe.stages.compute.trial import choose, is_worth_a_trial, time_on_one_thread
from kdpipe.stages.errors import RecipeError, cause
from kdpipe.stages.evaluation.macs import count_macs
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.hooks import extract_features
from kdpipe.stages.models.weights.state_dict import count_parameters
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.runtime.memory import is_out_of_memory
from kdpipe.stages.runtime.sync_batch_norm import batch_norm_over_processes
from kdpipe.stages.training.checkpoint import Progress, TrainState
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.optim import TrainConfig, build_optimizer
from kdpipe.stages.training.optimization.averaging import WeightAverage, has_modes
from kdpipe.stages.training.step import TrainStep
from kdpipe.stages.training.task import Batch

COMPILE = "train.compile"
"""The key, for messages."""

CPU_PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
"""What "auto" tries on a CPU, the most exact first."""


def candidates(job: TrainJob, device: torch.device) -> list[ComputeSettings]:
    """Return the settings that a recipe leaves open, in order of preference; the first needs no trial.

    Raises:
        RecipeError: The device does not compute the precision in hardware, or a loss cannot use it.
    """
    config, offered = job.config, ("float32", *fast_precisions(device))
    if job.task.needs_input_gradient:  # which underflows in float16, where no loss scale reaches it
        offered = tuple(one for one in offered if one != "float16")
    if config.precision not in ("auto", *offered):
        raise RecipeError(
            f"train.precision = {config.precision!r} is not what this device ({device.type}) computes in hardware, or "
            f"a loss cannot use it: choose 'auto' or one of {', '.join(offered)}."
        )
    precisions: tuple[Precision, ...]
    if config.precision != "auto":
        precisions = (config.precision,)
    elif device.type == "cuda":
        precisions = (next(one for one in ("bfloat16", "float16", "float32") if one in offered),)
    else:
        exact_only = job.task.needs_input_gradient  # which was not tried in bfloat16
        precisions = ("float32",) if exact_only else tuple(one for one in CPU_PRECISIONS if one in offered)
    has_convolutions = any(isinstance(module, nn.Conv2d) for module in job.model.modules())
    if has_convolutions and len(precisions) == 1 and precisions[0] != "float32" and config.memory_format == "auto":
        has_convolutions = _runs_in_channels_last(job)
    return [
        ComputeSettings(one, form, config.compile)
        for one in precisions
        for form in _formats(config, one, has_convolutions)
    ]


def _runs_in_channels_last(job: TrainJob) -> bool:
    """Return whether a network runs in channels_last; one with `view` after a convolution does not."""
    loader = job.task.loader
    size = loader.image_size if loader.size or loader.renderer is None else loader.renderer.shape[1:]
    model = clone_without_hooks(job.model).eval().to(memory_format=torch.channels_last)
    images = torch.zeros(2, loader.dataset.in_channels, *(size or ()), device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            model(images.contiguous(memory_format=torch.channels_last))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def compile_key(job: TrainJob, device: torch.device, monitor: RunMonitor) -> str | None:
    """Return the recipe key that asks for torch.compile; None if the job is not compiled.

    Raises:
        RecipeError: It cannot be compiled.
    """
    if not job.config.compile or job.task.hints_only:
        return None
    if job.task.needs_input_gradient:
        raise RecipeError(no_second_derivative(COMPILE))
    require_compilable(COMPILE, device, job.process_group.count)
    monitor.warn_once(job.stage, f"{COMPILE} = true: the first step compiles the network, which may take a minute.")
    return COMPILE


def require_compilable(key: str, device: torch.device, num_processes: int) -> None:
    """Raise RecipeError, naming the recipe key, where trainings cannot be compiled."""
    if num_processes > 1:
        raise RecipeError(
            f"{key} = true: trainings are compiled in one process only, and this one has {num_processes}: set {key} = "
            "false, or start one process."
        )
    require_compiler(device, key)


def no_second_derivative(key: str) -> str:
    """Return the message for a compiled network with a loss on the gradient by the pixels."""
    return (
        f"{key} = true: a loss uses the gradient by the pixels, and compiled networks have no second derivative: set "
        f"{key} = false."
    )


def _formats(config: TrainConfig, precision: Precision, has_convolutions: bool) -> tuple[MemoryFormat, ...]:
    """Return the memory formats to choose from. In a low precision convolutions are always faster in channels_last."""
    if config.memory_format != "auto":
        return (config.memory_format,)
    if not has_convolutions:
        return ("contiguous",)
    return ("contiguous", "channels_last") if precision == "float32" else ("channels_last",)


def resumed_settings(
    made_with: Mapping[str, Any], job: TrainJob, device: torch.device, monitor: RunMonitor
) -> ComputeSettings:
    """Return the settings of a checkpoint; those of an older kdpipe if it has none.

    On a device that does not compute them in hardware the job continues with those that are chosen there.
    """
    options = candidates(job, device)
    if "compute" not in made_with:
        formats = "contiguous" if job.config.memory_format == "auto" else job.config.memory_format
        return replace(options[0], memory_format=formats)
    settings = ComputeSettings.from_json(made_with["compute"])
    if settings.precision in ("float32", *fast_precisions(device)):
        return settings
    monitor.warn(
        "device",
        f"{job.name} began in {settings.precision}, which this device ({device.type}) does not compute in hardware: it "
        f"continues in {options[0].precision}, and its results may differ.",
    )
    return options[0]


def chosen_settings(
    job: TrainJob, device: torch.device, batches: Iterator[Batch], monitor: RunMonitor
) -> tuple[ComputeSettings, Iterator[Batch]]:
    """Return the settings for a job that begins, and all of its batches; set the number of its CPU threads.

    Jobs that run for long on a CPU try their first batch in each way, and take one that is clearly faster. Others have
    one thread, unless the user chose a number: more would mostly wait for each other.
    """
    options = candidates(job, device)
    counts = job.process_group.broadcast_object(open_counts()) if device.type == "cpu" else [max_threads()]
    if len(options) == len(counts) == 1 or job.config.epochs == 0:
        torch.set_num_threads(counts[-1])
        return options[0], batches
    first = next(batches)
    if not _is_long(job, first, device):
        torch.set_num_threads(counts[0])
        return options[0], chain([first], batches)
    settings = _fastest(job, options, first, device, monitor) if len(options) > 1 else options[0]
    settings = options[job.process_group.broadcast_object(options.index(settings))]
    torch.set_num_threads(_fastest_count(job, settings, counts, first, device))
    return settings, chain([first], batches)


def _fastest_count(
    job: TrainJob, settings: ComputeSettings, counts: Sequence[int], batch: Batch, device: torch.device
) -> int:
    """Return the number of CPU threads that is fastest at the steps of a copy of the job."""
    if len(counts) == 1:
        return counts[0]
    with torch.random.fork_rng(devices=[]), ExitStack() as stack:
        step = _copied_step(job, settings, batch, device, stack)
        found = fastest_count(counts, step, may_drop=job.process_group.count == 1)
    return job.process_group.broadcast_object(found)


def _is_long(job: TrainJob, batch: Batch, device: torch.device) -> bool:
    """Return whether a trial pays for a job, by its multiply-accumulates; a backward pass has twice those of a forward.

    Counting takes seconds, and is left out where each weight could meet each pixel without reaching the limit.
    """
    _, channels, height, width = batch.images.shape
    num_passes = 3 * job.task.num_samples * job.config.epochs * len(batch.images) // max(1, batch.num_samples)
    if not is_worth_a_trial(num_passes * count_parameters(job.model) * height * width, device):
        return False
    return is_worth_a_trial(num_passes * count_macs(job.model, (channels, height, width)), device)


def _fastest(
    job: TrainJob, options: list[ComputeSettings], batch: Batch, device: torch.device, monitor: RunMonitor
) -> ComputeSettings:
    """Time a step of copies of the job with each of the settings; network, buffers and random state stay as they are.

    Settings in which the network does not run are left out.
    """
    steps: dict[ComputeSettings, Callable[[], None]] = {}
    with torch.random.fork_rng(devices=[]), ExitStack() as stack:
        for settings in options:
            try:
                step = _copied_step(job, settings, batch, device, stack)
                step()
            except Exception as error:
                if settings == options[0] or is_out_of_memory(error):
                    raise
                tried = f"{settings.precision}, {settings.memory_format}"
                monitor.warn(job.stage, f"{job.name} does not run in {tried} ({cause(error)}): it is not used.")
            else:
                steps[settings] = step
        return choose(time_on_one_thread(steps, device, may_drop=job.process_group.count == 1))


def _copied_step(
    job: TrainJob, settings: ComputeSettings, batch: Batch, device: torch.device, stack: ExitStack
) -> Callable[[], None]:
    task = job.task
    if task.distillation is not None:
        task = replace(task, distillation=clone_without_hooks(task.distillation))  # type: ignore[arg-type]
    job = replace(job, model=clone_without_hooks(job.model), task=task)
    state = set_up(job, device, settings)
    twice = job.task.needs_input_gradient
    stack.enter_context(batch_norm_over_processes(state.modules, twice_differentiable=twice))
    student = stack.enter_context(extract_features(job.model, job.student_layers, no_further=job.task.hints_only))
    state.modules.train()
    step = TrainStep(job, student, state, Progress(), RunMonitor())
    return partial(step.step, replace(batch, images=batch.images.clone()))


def set_up(job: TrainJob, device: torch.device, settings: ComputeSettings = EXACT) -> TrainState:
    """Return what training changes, on the device: the network is moved in place."""
    job.process_group.use_device(device)
    distillation = job.task.distillation or nn.Module()
    modules = nn.ModuleDict({"student": job.model, "distillation": distillation}).to(device)
    settings.place(job.model)
    if job.config.epochs > 0 and not any(parameter.requires_grad for parameter in modules.parameters()):
        raise RecipeError(
            f"the {job.name} has no parameter that requires a gradient: unfreeze some, or do not train it."
        )
    optimizer = build_optimizer(job.config, modules)
    if has_modes(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    average = None if job.config.ema_decay is None else WeightAverage(job.model, job.config.ema_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
    return TrainState(modules, optimizer, scaler, average, settings)
