"""The stages on built data and views, each on one page: build the objects, hand them to the stage's functions.

Every step skips finished work and resumes stopped work. `run_stages.py` applies them to a recipe in its run folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kdpipe.pipeline.preflight import (
    require_export,
    try_student,
    try_teacher,
)
from kdpipe.stages.cache_teacher.cache import fill_store
from kdpipe.stages.cache_teacher.plan import (
    CacheConfig,
    build_cache_job,
    head_to_store,
    missing_bytes,
    plan_store,
    require_room,
    samples_in_row_order,
)
from kdpipe.stages.cache_teacher.trial import decide
from kdpipe.stages.compress.artifacts.export_student import export_student
from kdpipe.stages.compress.artifacts.write import artifact_folder
from kdpipe.stages.compress.compress import STEPS, CompressConfig, Step, compress, compressed_root
from kdpipe.stages.compress.fine_tune import build_fine_tuning
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.image_set import require_labels
from kdpipe.stages.distillation.adapters import save_adapters
from kdpipe.stages.distillation.embedding_student import evaluation_of_epochs, examine_student, labeled_for_probe
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.student_config import ALONE, DISTILLED, StudentConfig, student_folder
from kdpipe.stages.distillation.task_builder import build_student, build_task, label_settings
from kdpipe.stages.evaluation.embeddings import with_probe
from kdpipe.stages.evaluation.evaluate import of_teacher
from kdpipe.stages.given_teacher import is_as_expected, require_accuracy, require_given
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.runtime.events import ProgressEvent
from kdpipe.stages.runtime.launcher import ALL, WorkShard
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.teacher import (
    TeacherConfig,
    build_teacher,
    require_weights,
    teacher_fingerprint,
    teacher_folder,
)
from kdpipe.stages.train_student.student import StudentRun, student_fingerprint, train_hint_stages
from kdpipe.stages.training.finalize import add_onnx, finalize
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.shared_job import begun_job
from kdpipe.stages.training.task import TrainingTask
from kdpipe.store import ensure_store

# --- Stage 0: train a teacher, or take a trained one


def train_teacher(config: TeacherConfig, seed: int, context: StageContext) -> dict[str, Any]:
    """Build the teacher, train it unless it comes with weights, evaluate it and export it; return its results.

    Raises:
        RecipeError: The recipe has neither weights nor training, and the network brings no weights.
    """
    if require_weights(config, seed, context):
        own = f"{config.model.name} brings its own weights: it is not trained"
        context.monitor.report(ProgressEvent("train-teacher", own, 1, 1, "teacher"))
    if config.train is not None:
        require_labels(context.train_set)
        require_labels(context.deciding.test_set)
        context.process_group.require_shares(config.train.batch_size, context.train_set.num_samples)

    teacher = build_teacher(config, seed, context)
    require_given(config, teacher, context)
    try_teacher(config, teacher, context)
    inputs, job_dir = teacher_fingerprint(config, seed, teacher, context), teacher_folder(context.run_dir)
    accept = partial(is_as_expected, config)
    with begun_job(job_dir, inputs, context, stage="train-teacher", name="teacher", accept=accept) as done:
        return done if done is not None else _train_teacher(config, seed, teacher, context)


def _train_teacher(config: TeacherConfig, seed: int, teacher: ModelBundle, context: StageContext) -> dict[str, Any]:
    process_group, job_dir = context.process_group, teacher_folder(context.run_dir)
    teacher.model.to(context.device)
    test, validation = context.evaluation(teacher.normalize), context.validation(teacher.normalize)
    more: dict[str, Any] = {}
    if config.is_headless:
        labeled = labeled_for_probe(teacher.normalize, context)
        test, more = with_probe(teacher.model.eval(), labeled, test)
        if validation is not None:
            validation = (
                replace(validation, head=test.head) if labeled else with_probe(teacher.model, None, validation)[0]
            )
    else:
        test, validation = of_teacher(test, teacher.model), validation and of_teacher(validation, teacher.model)
    history: list[dict[str, Any]] = []
    if config.train is not None:
        # Views that no store will hold: the teacher must not be fitted to the images that it labels later.
        task = TrainingTask(
            context.train_loader, context.views.num_views, teacher.normalize, fresh_views=True, first_kind=True
        )
        job = TrainJob(
            stage="train-teacher",
            name="teacher",
            model=teacher.model,
            task=task,
            test=context.deciding.evaluation(teacher.normalize),
            config=config.train,
            seed=seed,
            job_dir=job_dir,
            process_group=process_group,
        )
        history = train(job, context.device, context.monitor)
    return finalize(  # evaluate, export to ONNX, save
        job_dir,
        teacher,
        history,
        test,
        process_group=process_group,
        with_onnx=config.exports,
        on_no_export=partial(_warn_of_no_export, context),
        more=more,
        require=partial(require_accuracy, config, teacher, test=test),
        validation=validation,
    )


def _warn_of_no_export(context: StageContext, reason: str) -> None:
    text = f"there is no ONNX file of the teacher, only its latency in the report needs one: {reason}"
    context.monitor.warn("train-teacher", text)


# --- Stage 1: run the teacher over every view, and cache its outputs


def cache_teacher(
    config: CacheConfig,
    path: Path,
    teacher: ModelBundle,
    features: Sequence[FeatureSpec],
    context: StageContext,
    *,
    work_shard: WorkShard = ALL,
    like: Path | None = None,
) -> dict[str, Any]:
    """Fill this job's share of the store at `path` with the teacher's logits and `features`, for every view.

    A store that lacks views, samples or layers is extended in place. The teacher of a new store is computed as that of
    the store `like`, if there is one, or as the recipe and a trial say. Returns the store's figures.

    Raises:
        FingerprintMismatch: The store at `path` was made from other inputs.
        RunError: The disk is too small.
        Exception: As `fill_store`.
    """
    samples = samples_in_row_order(context)
    planned = plan_store(config, teacher, features, samples, context)
    require_room(path, missing_bytes(path, planned, samples))

    manifest = ensure_store(
        path,
        planned,
        samples,
        decide=lambda new: decide(new, config, teacher, features, context, like=like),
        check=context.monitor.check,
        head=head_to_store(config, teacher, features, context),
    )
    job = build_cache_job(config, path, manifest, teacher, context)
    figures = fill_store(job, work_shard.select(manifest.layout.units()))
    return {**figures, "part": str(work_shard) if work_shard.count > 1 else None}


# --- Stage 2: train students from the stores


def train_student(
    config: StudentConfig,
    seed: int,
    spec: DistillationSpec | None,
    context: StageContext,
    *,
    student_run: StudentRun | None = None,
) -> dict[str, Any]:
    """Build a student, its losses and targets, train it, evaluate it and export it; return its results.

    Args:
        config: The recipe's `student` section.
        seed: The student's seed.
        spec: The opened stores and losses; None for a student on hard labels alone.
        context: The data and views.
        student_run: The student's folder and name; by default those of `kdpipe train-student`.
    """
    context = config.context(context)
    kind, process_group = ALONE if spec is None else DISTILLED, context.process_group
    student_run = student_run or StudentRun(student_folder(context.run_dir, kind, seed), f"student {kind}, seed {seed}")
    process_group.require_shares(config.train.batch_size, context.train_set.num_samples)

    student = build_student(config, seed, context, spec)
    student_run = replace(student_run, with_onnx=student_run.with_onnx and config.export)
    try_student(replace(config, export=student_run.with_onnx), student, student_run.job_dir, context)
    inputs = student_fingerprint(config, seed, spec, student, context)
    with begun_job(student_run.job_dir, inputs, context, stage="train-student", name=student_run.name) as done:
        if done is None:
            return _train_student(config, seed, spec, student, context, student_run=student_run)
        if student_run.with_onnx and done["onnx_bytes"] is None:  # it was trained with student.export = false
            test = context.evaluation(student.normalize)
            return process_group.on_main(partial(add_onnx, student_run.job_dir, student, done, test))
        return done


def _train_student(
    config: StudentConfig,
    seed: int,
    spec: DistillationSpec | None,
    student: ModelBundle,
    context: StageContext,
    *,
    student_run: StudentRun,
) -> dict[str, Any]:
    main, process_group = spec.without_hint_losses if spec else None, context.process_group
    test = context.evaluation(student.normalize)
    job = TrainJob(
        stage="train-student",
        name=student_run.name,
        model=student.model,
        task=build_task(student, main, seed, context, **label_settings(config)),  # losses and targets
        test=context.deciding.evaluation(student.normalize),
        config=config.train,
        seed=seed,
        job_dir=student_run.job_dir,
        student_layers=main.student_layers if main else (),
        process_group=process_group,
        evaluate=evaluation_of_epochs(student, spec, context),
    )
    if spec is not None:
        build = partial(_build_hint_task, student, spec, context)
        train_hint_stages(job, student, spec.losses, build, device=context.device, monitor=context.monitor)
    history = train(job, context.device, context.monitor)
    more = process_group.on_main(partial(save_adapters, student_run.job_dir, job.task.distillation))
    more |= process_group.on_main(partial(examine_student, student, spec, context))
    # evaluate, export to ONNX, save
    return finalize(
        student_run.job_dir,
        student,
        history,
        test,
        process_group=process_group,
        with_onnx=student_run.with_onnx,
        more=more,
        validation=context.validation(student.normalize),
    )


def _build_hint_task(
    student: ModelBundle, spec: DistillationSpec, context: StageContext, loss: Loss, seed: int
) -> TrainingTask:
    return build_task(student, spec.of_output([loss]), seed, context)


# --- Stage 3: prune, quantize and export the distilled students


def compress_student(
    config: CompressConfig,
    student: StudentConfig,
    seed: int,
    spec: DistillationSpec,
    context: StageContext,
    *,
    steps: Sequence[Step] = STEPS,
    name: str = "student",
    root: Path | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """Prune and quantize a seed's student, fine-tuning it from the stores; export what came of it, to `root`.

    Returns:
        The figures of each network, and the card of the exported artifacts, None if `steps` lacks "export".
    """
    require_export(student, config)
    root = root or compressed_root(context.run_dir, config)
    fine_tuning = build_fine_tuning(student, seed, spec, context, root)  # student, task, test images
    figures = compress(config, fine_tuning, only=steps)  # prune, fine-tune, quantize, fine-tune, evaluate
    if "export" not in steps:
        return figures, None
    card = export_student(config, fine_tuning, name=name)
    return figures, {"folder": str(artifact_folder(root, seed)), **card}
