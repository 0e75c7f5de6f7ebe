"""Stage 2, `kdpipe train-student`: train students on hard labels alone, and distilled from stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kdpipe.stages.config import config_fingerprint
from kdpipe.stages.context import StageContext
from kdpipe.stages.distillation.classifier_reuse import require_teacher
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.stores import open_stores
from kdpipe.stages.distillation.student_config import ALONE, DISTILLED, StudentConfig, student_folder
from kdpipe.stages.distillation.task_builder import build_student, build_task, student_shapes
from kdpipe.stages.distillation.teacher_accuracy import test_accuracies
from kdpipe.stages.losses.base import LossConfig
from kdpipe.stages.losses.distillation import student_layers
from kdpipe.stages.losses.features.fitnet import FitNetConfig
from kdpipe.stages.losses.features.simkd import SimKDConfig
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.numerics import derive_seed
from kdpipe.stages.training.finalize import finalize
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.saved_model import save_model
from kdpipe.stages.training.step import TrainJob
from kdpipe.store import make_folders


def open_distillation(
    places: Sequence[Path | str],
    losses: Sequence[LossConfig],
    student: StudentConfig,
    identity: Mapping[str, Any],
    context: StageContext,
) -> DistillationSpec:
    """Open and check the stores for `losses`. Raises the same as `open_stores`."""
    shapes = student_shapes(student, losses, context)
    spec = open_stores(places, losses, student, identity, context, shapes=shapes)
    if student.teachers.weights == "accuracy":
        spec = replace(spec, accuracies=test_accuracies(places, student.teachers, context))
    for loss in losses:
        if isinstance(loss, SimKDConfig):
            store = spec.stores[loss.store or 0]
            require_teacher(loss, context.run_dir, store.manifest.identity.teacher, store.path)
    return spec


@dataclass(frozen=True)
class StudentRun:
    """The folder and name of a student's training, and whether to export an ONNX file."""

    job_dir: JobDir
    name: str
    with_onnx: bool = True


def train_student(
    config: StudentConfig,
    seed: int,
    spec: DistillationSpec | None,
    context: StageContext,
    *,
    run: StudentRun | None = None,
) -> dict[str, Any]:
    """Train one student, distilled by `teaching` or alone if that is None, and return its results.

    Training resumes where it was stopped; a finished student is not trained again. `run` defaults to a folder of
    setup.run.
    """
    if run is None:
        kind = ALONE if spec is None else DISTILLED
        run = StudentRun(student_folder(context.run_dir, kind, seed), f"{kind} student, seed {seed}")
    context.process_group.require_shares(config.train.batch_size, context.train_set.num_samples)
    folder = run.job_dir
    network = build_student(config, seed, context, spec.losses if spec else ())

    def begin() -> dict[str, Any] | None:
        folder.begin(_made_from(config, seed, spec, network, context))
        return folder.result()

    if (done := context.process_group.on_main(begin)) is not None:
        return done
    if spec is not None:
        _hint_stages(config, seed, spec, context, network, run=run)
        spec = spec.main_stage
    task = build_task(network, spec, seed, context, label_smoothing=config.label_smoothing)
    layers = student_layers(spec.losses) if spec else ()
    test = context.evaluation(network.normalize)
    job = TrainJob(
        "train-student",
        run.name,
        network.model,
        task,
        test,
        config.train,
        seed,
        folder,
        layers,
        process_group=context.process_group,
    )
    return finalize(folder, network, train(job, context.device, context.monitor), context, with_onnx=run.with_onnx)


def _made_from(
    config: StudentConfig, seed: int, spec: DistillationSpec | None, network: ModelBundle, context: StageContext
) -> dict[str, Any]:
    """Return the inputs that determine a student."""
    return {
        "starts_from": network.identity,
        "train": config_fingerprint(config.train),
        "seed": seed,
        "data": context.data_identity(),
        "test": context.test_identity(),
        "views": context.student_views(),
        "label_smoothing": config.label_smoothing,
        "teaching": spec.to_json() if spec else None,
    }


def _hint_stages(
    config: StudentConfig,
    seed: int,
    spec: DistillationSpec,
    context: StageContext,
    network: ModelBundle,
    *,
    run: StudentRun,
) -> None:
    """Run the hint stages of `fitnet` losses, before the student's own training.

    Each hint is trained alone, with only the modules up to its layer, at a constant learning rate. Each stage writes a
    file from which the next one starts.
    """
    process_group = context.process_group
    if process_group.on_main(run.job_dir.checkpoint.exists):
        return  # the student's own training has begun
    stages = [stage for loss in spec.losses if isinstance(loss, FitNetConfig) for stage in loss.stages()]
    for number, stage in enumerate(stages, 1):
        own = JobDir(run.job_dir.path / f"hint{number}")
        if not process_group.on_main(partial(_has_model, own)):
            task = build_task(network, spec.with_losses([stage]), derive_seed(seed, "hint", number), context)
            job = TrainJob(
                "train-student",
                f"{run.name}, hint {number} of {len(stages)}",
                network.model,
                replace(task, hints_only=True),
                None,
                replace(config.train, epochs=stage.stage_epochs, schedule="step", milestones=()),
                seed,
                own,
                stage.student_layers(),
                process_group=process_group,
            )
            train(job, context.device, context.monitor)
            record = {"architecture": dict(network.architecture)}
            process_group.on_main(partial(save_model, own.model, network.model, record))
        if process_group.is_main:
            own.checkpoint.unlink(missing_ok=True)
        network.model.load_state_dict(load_tensors(own.model)[0])


def _has_model(folder: JobDir) -> bool:
    """Create a job's folder and return whether its network exists."""
    make_folders([folder.path])
    return folder.model.exists()
