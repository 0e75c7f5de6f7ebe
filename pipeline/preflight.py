"""What is tried before anything is trained: each network of a recipe, in all the ways that its jobs will run it."""

from __future__ import annotations

import numpy as np
import torch

from kdpipe.pipeline.recipe.load import trainings_of
from kdpipe.pipeline.run import Run
from kdpipe.stages.cache_teacher.choice import COMPILE as CACHE_COMPILE
from kdpipe.stages.compress.compress import CompressConfig, dry_run, is_done
from kdpipe.stages.compute.compiled import require_compiler, require_traceable
from kdpipe.stages.context import StageContext
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.student_config import ALONE, DISTILLED, StudentConfig, student_folder
from kdpipe.stages.distillation.task_builder import build_student, build_task
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.teacher import TeacherConfig, build_teacher, teacher_folder
from kdpipe.stages.training.class_balance import class_weights
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.preflight import try_network
from kdpipe.stages.training.set_up import require_compilable
from kdpipe.stages.training.task import TrainingTask


def preflight(run: Run, *, with_teacher: bool = True, compresses: bool = True) -> None:
    """Try the networks that a recipe trains and compresses, without those whose jobs have begun.

    Args:
        run: The recipe in its run folder.
        with_teacher: Whether the teacher is trained.
        compresses: Whether the student is compressed.

    Raises:
        ModelError: A network cannot be evaluated, trained, exported, pruned or quantized.
        RecipeError: It cannot be with these settings.
    """
    recipe, context = run.recipe, run.context
    for where, training in trainings_of(recipe).items():
        if training.compile:
            require_compilable(f"{where}.compile", context.device, context.process_group.count)
        class_weights(training, context.train_set.labels, context.train_set.num_classes)
    if recipe.cache.compile:
        require_compiler(context.device, CACHE_COMPILE)
    if with_teacher:
        teacher = build_teacher(recipe.teacher, recipe.seed, context)
        if recipe.cache.compile:
            require_traceable(teacher.model.eval(), torch.zeros(2, *context.image_shape), CACHE_COMPILE)
        try_teacher(recipe.teacher, teacher, context)
    seed = recipe.student.seeds[0]
    student = build_student(recipe.student, seed, context)
    for kind in [ALONE] * recipe.student.baseline + [DISTILLED]:
        try_student(recipe.student, student, student_folder(run.folder, kind, seed), context)
    if compresses and recipe.student.export and not is_done(recipe.compress, recipe.student, run.folder):
        dry_run(recipe.compress, recipe.student, recipe.distill, context)


def try_teacher(config: TeacherConfig, teacher: ModelBundle, context: StageContext) -> None:
    """Run the teacher as its training and evaluation will, unless its job has begun.

    Raises:
        ModelError, RecipeError: That fails.
    """
    if _is_new(teacher_folder(context.run_dir)):  # in every process: a step in training takes all of them
        try_network(teacher, config.train, role="teacher", device=context.device)


def try_student(config: StudentConfig, student: ModelBundle, job_dir: JobDir, context: StageContext) -> None:
    """Run the untrained student as its training and export will, unless its job in `job_dir` has begun.

    Raises:
        ModelError, RecipeError: That fails.
    """
    if _is_new(job_dir):
        try_network(student, config.train, role="student", device=context.device, exports=config.export)


def try_distillation(run: Run, spec: DistillationSpec, config: StudentConfig) -> TrainingTask:
    """Build a first training task, so that errors and warnings come before any training."""
    seed, context = config.seeds[0], config.context(run.context)
    task = build_task(build_student(config, seed, context, spec), spec, seed, context)
    if task.targets and task.targets.num_without_targets:
        count = f"{task.targets.num_without_targets:,} of {task.num_samples:,} samples have no targets"
        run.monitor.warn("train-student", f"{count}: they are trained on their labels alone.")
    warn_of_absent_samples(run, spec)
    return task


def warn_of_absent_samples(run: Run, spec: DistillationSpec) -> None:
    """Warn of a store's samples that the data set has lost; a recipe that selects some of them says so itself."""
    data = run.recipe.data
    if data.num_train is not None or data.classes is not None or data.validation_share:
        return
    for store in spec.stores:
        absent = store.samples.ids[~np.isin(store.samples.ids, run.context.train_set.sample_ids.numpy())]
        if len(absent):
            count = f"{len(absent):,} of the {len(store.samples.ids):,} samples of {store.path}"
            some = f"such as {absent[:3].tolist()}"
            run.monitor.warn("train-student", f"{count}, {some}, are not in the data set: it is trained on the others.")


def require_losses(run: Run) -> None:
    """Raise RecipeError for a recipe without a distillation loss."""
    if not run.recipe.distill:
        raise RecipeError(
            f"the recipe {run.recipe.name} has no [[distill]]: add a loss (`kdpipe losses` lists them), or train "
            "students without a teacher: with `kdpipe compare`, or `kdpipe cohort` without cohort.with_teacher."
        )


def require_export(student: StudentConfig, compression: CompressConfig) -> None:
    """Raise RecipeError if the students to compress are not exported."""
    if not student.export and compression.student is None:
        raise RecipeError(
            "student.export = false: compress measures and hands over ONNX files. Set it to true and run "
            "`kdpipe train-student` again, which adds them to finished students."
        )


def _is_new(job_dir: JobDir) -> bool:
    return not job_dir.checkpoint.exists() and not (job_dir.path / "result.json").exists()
