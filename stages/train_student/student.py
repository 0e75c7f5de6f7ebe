"""The parts of stage 2, `kdpipe train-student`: a student's folder and fingerprint, and the hint stages of FitNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from kdpipe.stages.config import config_fingerprint
from kdpipe.stages.context import StageContext
from kdpipe.stages.distillation.adapters import save_adapters
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.features.fitnet import InitialLoss
from kdpipe.stages.losses.features.ft import FT, Paraphrase, load_paraphrasers
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import overwritten_layers
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.numerics import derive_seed
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.saved_model import save_model
from kdpipe.stages.training.task import TrainingTask
from kdpipe.store import make_folders
from kdpipe.store.fs.checksums import remove_with_sum


@dataclass(frozen=True)
class StudentRun:
    """The folder and name of a student's training, and whether to export an ONNX file."""

    job_dir: JobDir
    name: str
    with_onnx: bool = True


def student_fingerprint(
    config: StudentConfig, seed: int, spec: DistillationSpec | None, network: ModelBundle, context: StageContext
) -> dict[str, Any]:
    """Return everything that determines a student."""
    context = config.context(context)
    hooked = spec.student_layers if spec else ()
    own_outputs = sorted(overwritten_layers(network.model, hooked, context.image_shape)) if hooked else None
    return {
        "starts_from": network.identity,
        "train": config_fingerprint(config.train),
        "seed": seed,
        "data": context.training_identity(),
        "test": context.test_identity(),
        "views": context.student_views(),
        "label_smoothing": config.label_smoothing,
        **config.hard_labels,
        "distillation": spec.to_json() if spec else None,
        **({"own_outputs": own_outputs} if own_outputs else {}),  # earlier versions learned from what was left of them
    }


def train_hint_stages(
    job: TrainJob,
    student: ModelBundle,
    losses: Sequence[Loss],
    build: Callable[[Loss, int], TrainingTask],
    *,
    device: torch.device,
    monitor: RunMonitor,
) -> None:
    """Train the stages of `fitnet`, `ab`, `fsp` and `ft` losses, before the student's own training.

    Each is trained alone, with only the student's modules up to its layer, at a constant learning rate. Each stage
    writes a file from which the next one starts. That of `ft` trains paraphrasers, and leaves the student as it is.

    Args:
        job: The student's own training.
        student: The student, which is trained in place.
        losses: The losses, of which those have stages.
        build: Builds the training task of one stage from its loss and a seed for its adapters.
        device: The device to train on.
        monitor: Progress and the stop flag.
    """
    process_group = job.process_group
    stages = [stage for loss in losses for stage in _stages_of(loss)]
    if not stages or process_group.on_main(job.job_dir.checkpoint.exists):
        return  # the student's own training has begun
    paraphrasers = iter(_paraphrased(job.task))
    for number, (stage, config) in enumerate(stages, 1):
        job_dir = JobDir(job.job_dir.path / f"hint{number}")
        is_paraphrase = isinstance(stage, Paraphrase)
        if not process_group.on_main(partial(_has_model, job_dir)):
            initial = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
            hint = replace(
                job,
                name=f"{job.name}, hint {number} of {len(stages)}",
                task=replace(build(stage, derive_seed(job.seed, "hint", number)), hints_only=True),
                test=None,
                config=replace(job.config, schedule="constant", schedule_args={}, **config),
                job_dir=job_dir,
                student_layers=stage.student_layers(),
            )
            train(hint, device, monitor)
            if is_paraphrase:
                student.model.load_state_dict(initial)
                process_group.on_main(partial(save_adapters, job_dir, hint.task.distillation))
            record = {"architecture": dict(student.architecture)}
            process_group.on_main(partial(save_model, job_dir.model, student.model, record))
        if process_group.is_main:
            remove_with_sum(job_dir.checkpoint)
        student.model.load_state_dict(load_tensors(job_dir.model)[0])
        if is_paraphrase:
            load_paraphrasers(next(paraphrasers), load_tensors(job_dir.adapters)[0])


def _stages_of(loss: Loss) -> list[tuple[Loss, dict[str, Any]]]:
    """Return the stages of a loss before the student's training, each with the settings of its training."""
    if isinstance(loss, FT):
        return [(loss.paraphrase(), {"epochs": loss.stage_epochs, "lr": loss.stage_lr})]
    return [(stage, {"epochs": stage.stage_epochs}) for stage in loss.stages()] if isinstance(loss, InitialLoss) else []


def _paraphrased(task: TrainingTask) -> list[nn.Module]:
    """Return the modules of the losses that learn from paraphrasers."""
    losses = task.distillation.losses.values() if task.distillation else ()
    return [loss for loss in losses if isinstance(loss.config, FT)]


def _has_model(folder: JobDir) -> bool:
    """Create a job's folder and return whether its network exists."""
    make_folders([folder.path])
    return folder.model.exists()
