"""Stage 2, `kdpipe train-student`: train students on hard labels alone, and distilled from stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kdpipe.stages.config import deciding
from kdpipe.stages.context import Setup
from kdpipe.stages.distillation.classifier_reuse import require_teacher
from kdpipe.stages.distillation.spec import Teaching
from kdpipe.stages.distillation.stores import open_stores
from kdpipe.stages.distillation.student_config import ALONE, DISTILLED, StudentConfig, student_folder
from kdpipe.stages.distillation.task_builder import build_lesson, fresh_student, student_shapes
from kdpipe.stages.distillation.teacher_accuracy import test_accuracies
from kdpipe.stages.losses.base import Entry
from kdpipe.stages.losses.distillation import student_layers
from kdpipe.stages.losses.features.fitnet import FitNetConfig
from kdpipe.stages.losses.features.simkd import SimKDConfig
from kdpipe.stages.models.bundle import Network
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.numerics import derive_seed
from kdpipe.stages.training.finalize import finish
from kdpipe.stages.training.job_dir import JobFolder
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.saved_model import save_model
from kdpipe.stages.training.step import Job
from kdpipe.store import make_folders


def open_teaching(
    places: Sequence[Path | str],
    losses: Sequence[Entry],
    student: StudentConfig,
    identity: Mapping[str, Any],
    setup: Setup,
) -> Teaching:
    """Open and check the stores for `losses`. Raises the same as `open_stores`."""
    shapes = student_shapes(student, losses, setup)
    teaching = open_stores(places, losses, student, identity, setup, shapes=shapes)
    if student.teachers.weights == "accuracy":
        teaching = replace(teaching, accuracies=test_accuracies(places, student.teachers, setup))
    for loss in losses:
        if isinstance(loss, SimKDConfig):
            store = teaching.stores[loss.store or 0]
            require_teacher(loss, setup.run, store.manifest.identity.teacher, store.path)
    return teaching


@dataclass(frozen=True)
class StudentRun:
    """The folder and name of a student's training, and whether to export an ONNX file."""

    folder: JobFolder
    name: str
    with_onnx: bool = True


def train_student(
    config: StudentConfig, seed: int, teaching: Teaching | None, setup: Setup, *, run: StudentRun | None = None
) -> dict[str, Any]:
    """Train one student, distilled by `teaching` or alone if that is None, and return its results.

    Training resumes where it was stopped; a finished student is not trained again. `run` defaults to a folder of
    setup.run.
    """
    if run is None:
        kind = ALONE if teaching is None else DISTILLED
        run = StudentRun(student_folder(setup.run, kind, seed), f"{kind} student, seed {seed}")
    setup.processes.require_shares(config.train.batch_size, setup.train_set.num_samples)
    folder = run.folder
    network = fresh_student(config, seed, setup, teaching.losses if teaching else ())

    def begin() -> dict[str, Any] | None:
        folder.begin(_made_from(config, seed, teaching, network, setup))
        return folder.result()

    if (done := setup.processes.once(begin)) is not None:
        return done
    if teaching is not None:
        _hint_stages(config, seed, teaching, setup, network, run=run)
        teaching = teaching.main
    lesson = build_lesson(network, teaching, seed, setup, label_smoothing=config.label_smoothing)
    layers = student_layers(teaching.losses) if teaching else ()
    test = setup.test(network.normalise)
    job = Job(
        "train-student",
        run.name,
        network.model,
        lesson,
        test,
        config.train,
        seed,
        folder,
        layers,
        processes=setup.processes,
    )
    return finish(folder, network, train(job, setup.device, setup.watch), setup, with_onnx=run.with_onnx)


def _made_from(
    config: StudentConfig, seed: int, teaching: Teaching | None, network: Network, setup: Setup
) -> dict[str, Any]:
    """Return the inputs that determine a student."""
    return {
        "starts_from": network.identity,
        "train": deciding(config.train),
        "seed": seed,
        "data": setup.data_identity(),
        "test": setup.test_identity(),
        "views": setup.shown_views(),
        "label_smoothing": config.label_smoothing,
        "teaching": teaching.to_json() if teaching else None,
    }


def _hint_stages(
    config: StudentConfig, seed: int, teaching: Teaching, setup: Setup, network: Network, *, run: StudentRun
) -> None:
    """Run the hint stages of `fitnet` losses, before the student's own training.

    Each hint is trained alone, with only the modules up to its layer, at a constant learning rate. Each stage writes a
    file from which the next one starts.
    """
    processes = setup.processes
    if processes.once(run.folder.checkpoint.exists):
        return  # the student's own training has begun
    stages = [stage for loss in teaching.losses if isinstance(loss, FitNetConfig) for stage in loss.stages()]
    for number, stage in enumerate(stages, 1):
        own = JobFolder(run.folder.path / f"hint{number}")
        if not processes.once(partial(_has_model, own)):
            lesson = build_lesson(network, teaching.of([stage]), derive_seed(seed, "hint", number), setup)
            job = Job(
                "train-student",
                f"{run.name}, hint {number} of {len(stages)}",
                network.model,
                replace(lesson, hints_only=True),
                None,
                replace(config.train, epochs=stage.stage_epochs, schedule="step", milestones=()),
                seed,
                own,
                stage.student_layers(),
                processes=processes,
            )
            train(job, setup.device, setup.watch)
            record = {"architecture": dict(network.architecture)}
            processes.once(partial(save_model, own.model, network.model, record))
        if processes.first:
            own.checkpoint.unlink(missing_ok=True)
        network.model.load_state_dict(load_tensors(own.model)[0])


def _has_model(folder: JobFolder) -> bool:
    """Create a job's folder and return whether its network exists."""
    make_folders([folder.path])
    return folder.model.exists()
