"""Fine-tune a compressed student with the shared training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.stages.compress.pruning.sparsity import apply_masks
from kdpipe.stages.compress.resume import TrainedModel
from kdpipe.stages.config import config_fingerprint
from kdpipe.stages.context import StageContext
from kdpipe.stages.distillation.adapters import KeptChannels, restore_adapters
from kdpipe.stages.distillation.embedding_student import examine_student
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.student_config import DISTILLED, StudentConfig, student_folder
from kdpipe.stages.distillation.task_builder import build_student, build_task, label_settings
from kdpipe.stages.evaluation.evaluate import Evaluation
from kdpipe.stages.losses.distillation import Distillation
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.task import TrainingTask


@dataclass(frozen=True)
class FineTuneContext:
    """What all fine-tunings of one student's compression share.

    Attributes:
        seed: The student's seed.
        spec: The stores and losses; None for the baseline, which is fine-tuned with hard labels alone.
        label_smoothing: Of the hard labels alone.
        build_student: Builds the untrained student.
        build_task: Builds a network's training task for stores and losses: adapters fit its current widths, and
            schedules are at their end.
        evaluation: Returns the test images for a model's normalization.
        validation: Returns the validation images, None if there are none.
        examine: Returns what a fine-tuned network's embeddings tell, for students of embeddings, and fits its head.
        inputs: The identities of data and views, which decide the results.
        run_dir: The run folder, with the teacher.
        student_dir: The folder of the student.
        root: The folder of the compressed networks.
        device: The device to train on.
        monitor: Progress and the stop flag.
        is_baseline: Whether it is that of the baseline, fine-tuned with hard labels alone.
    """

    seed: int
    spec: DistillationSpec | None
    label_smoothing: float
    build_student: Callable[[], ModelBundle]
    build_task: Callable[[ModelBundle, DistillationSpec | None], TrainingTask]
    evaluation: Callable[[Normalization], Evaluation]
    validation: Callable[[Normalization], Evaluation | None]
    examine: Callable[[ModelBundle], dict[str, Any]]
    inputs: Mapping[str, Any]
    run_dir: Path
    student_dir: JobDir
    root: Path
    device: torch.device
    monitor: RunMonitor
    is_baseline: bool = False

    @property
    def exports_onnx(self) -> bool:
        """Whether its networks are exported to ONNX; those of the baseline are not."""
        return not self.is_baseline

    @property
    def baseline(self) -> FineTuneContext:
        """That of the baseline."""
        return replace(self, spec=None, is_baseline=True)

    def deciding(self, normalize: Normalization) -> Evaluation:
        """Return the images that decide: the validation images, or without any the test images."""
        return self.validation(normalize) or self.evaluation(normalize)

    def job_dir(self, kind: str) -> JobDir:
        """Return the folder of this seed's network of a kind, such as `pruned`."""
        return JobDir(self.root / f"{kind}-seed{self.seed}")

    def fingerprint(self, compression: Mapping[str, Any], source: TrainedModel, config: TrainConfig) -> dict[str, Any]:
        """Return everything that determines the result of fine-tuning a network made from `source`."""
        adapters = source.adapters_sha256 if self.spec else None
        return {
            **compression,
            "starts_from": source.identity,
            **({"adapters": adapters} if adapters else {}),
            "train": config_fingerprint(config),
            "seed": self.seed,
            **self.inputs,
            "label_smoothing": self.label_smoothing if self.spec is None else 0.0,
            "distillation": self.spec.to_json() if self.spec else None,
        }

    def task(self, network: ModelBundle, *, keeps_widths: bool = False) -> TrainingTask:
        """Build a network's training task; `keeps_widths` of adapters that were built for the unpruned student.

        Raises what `build_task` raises.
        """
        spec = self.spec.without_hint_losses if self.spec else None
        if spec and keeps_widths:
            spec = spec.with_losses([loss.with_widths_of(spec.shapes) for loss in spec.losses])
        return self.build_task(network, spec)


def build_fine_tuning(
    student: StudentConfig,
    seed: int,
    spec: DistillationSpec | None,
    context: StageContext,
    root: Path,
    *,
    student_dir: JobDir | None = None,
) -> FineTuneContext:
    """Return what the fine-tunings of a seed's student share, in the folder `root`.

    The student is that of `kdpipe train-student`, or the one in the folder `student_dir`.
    """
    context, labels = student.context(context), label_settings(student)
    return FineTuneContext(
        seed=seed,
        spec=spec,
        label_smoothing=student.label_smoothing,
        build_student=lambda: build_student(student, seed, context, spec),
        build_task=lambda network, losses: build_task(network, losses, seed, context, **labels, is_fine_tuning=True),
        evaluation=context.evaluation,
        validation=context.validation,
        examine=lambda network: examine_student(network, spec, context),
        inputs={
            "data": context.training_identity(),
            "test": context.test_identity(),
            "views": context.student_views(),
            **student.hard_labels,
        },
        run_dir=context.run_dir,
        student_dir=student_dir or student_folder(context.run_dir, DISTILLED, seed),
        root=root,
        device=context.device,
        monitor=context.monitor,
    )


@dataclass(frozen=True)
class FineTuneJob:
    """One fine-tuning.

    Attributes:
        name: Its name in progress reports.
        warm_up: Called once, before the first step.
        before_epoch: Called with the model and the epoch's number.
        masks: By parameter name, false where weights stay zero.
        adapters: The adapters of the losses to start with, of the network before it was pruned.
        kept: The channels of the losses' layers that were kept of it.
    """

    name: str
    network: ModelBundle
    job_dir: JobDir
    config: TrainConfig
    warm_up: Callable[[nn.Module, TrainingTask], None] = lambda model, task: None
    before_epoch: Callable[[nn.Module, int], None] = lambda model, epoch: None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    adapters: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, KeptChannels] = field(default_factory=dict)


def fine_tune(job: FineTuneJob, fine_tuning: FineTuneContext) -> tuple[list[dict[str, Any]], Distillation | None]:
    """Train a network, from its checkpoint if there is one; return the metrics of each epoch, and its losses.

    Raises what `train` and `FineTuneContext.task` raise.
    """
    model = job.network.model.to(fine_tuning.device)
    task = fine_tuning.task(job.network, keeps_widths=bool(job.adapters))
    if not job.job_dir.checkpoint.exists():
        _restore(task, job, fine_tuning)
        job.warm_up(model, task)
    masks = {name: mask.to(fine_tuning.device) for name, mask in job.masks.items()}
    training = TrainJob(
        "compress",
        job.name,
        model,
        task,
        fine_tuning.deciding(job.network.normalize),
        job.config,
        fine_tuning.seed,
        job.job_dir,
        fine_tuning.spec.without_hint_losses.student_layers if fine_tuning.spec else (),
        job.before_epoch,
        after_step=lambda trained: apply_masks(trained, masks),
    )
    return train(training, fine_tuning.device, fine_tuning.monitor), task.distillation


def _restore(task: TrainingTask, job: FineTuneJob, fine_tuning: FineTuneContext) -> None:
    """Load the adapters of the losses, and warn where they start from random."""
    if task.distillation is None or not task.distillation.state_dict() or job.config.epochs == 0:
        return
    if not job.adapters:
        fresh, why = list(task.distillation.losses), "none were kept beside the student"
    else:
        fresh, why = restore_adapters(task.distillation, job.adapters, job.kept), "they do not fit the pruned student"
    fresh = [name for name in fresh if task.distillation.losses[name].state_dict()]
    if fresh:
        warning = f"{job.name}: the adapters of {', '.join(fresh)} start from random, as {why}"
        fine_tuning.monitor.warn("compress", f"{warning}; these losses are large in the first epochs.")
