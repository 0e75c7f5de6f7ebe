"""The stages of a run, one function each, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdpipe.pipeline.run import Run
from kdpipe.stages.cache_teacher.cache import cache_teacher
from kdpipe.stages.cache_teacher.estimate import plan_cache, probe
from kdpipe.stages.cache_teacher.preview import ViewPreview, show_views
from kdpipe.stages.cache_teacher.test_targets import cache_test_store
from kdpipe.stages.compress.artifacts.export_student import export_student
from kdpipe.stages.compress.artifacts.write import artifact_folder
from kdpipe.stages.compress.compress import (
    STEPS,
    Step,
    compress,
    compressed_root,
    dry_run,
    float_job,
    is_done,
    student_sensitivity,
)
from kdpipe.stages.compress.fine_tune import FineTuneContext
from kdpipe.stages.compress.quantization.sensitivity import LayerSensitivity
from kdpipe.stages.context import test_context
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.student_config import ALONE, DISTILLED, StudentConfig, view_warning
from kdpipe.stages.distillation.task_builder import build_student, build_task
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.runtime.events import ProgressEvent
from kdpipe.stages.targets.open import local_store_path, open_with_views, test_store_path
from kdpipe.stages.train_student.student import train_student
from kdpipe.stages.train_teacher import (
    load_teacher,
    require_same_training,
    teacher_folder,
    train_teacher,
    untrained_teacher,
)
from kdpipe.stages.training.task import TrainingTask
from kdpipe.store import is_url, read_store_manifest


def run_train_teacher(run: Run) -> dict[str, Any]:
    """Train the teacher, or load its weights."""
    return {"teacher": train_teacher(run.recipe.teacher, run.recipe.seed, run.context)}


def run_cache_teacher(run: Run) -> dict[str, Any]:
    """Fill the stores of the training and the test images."""
    require_same_training(run.recipe.teacher, run.recipe.seed, run.context)
    teacher = load_teacher(run.recipe.teacher, run.recipe.seed, run.context)
    layers = list(run.required_features(teacher))
    _plan_test(run, teacher, trained=True)  # report obstacles before the long work begins
    cached = cache_teacher(run.recipe.cache, run.store, teacher, layers, run.context, part=run.part)
    test_store = cache_test_store(run.recipe.cache, run.store, teacher, run.context, part=run.part)
    return {"store": cached, "test_store": test_store}


def _plan_test(run: Run, teacher: ModelBundle, *, trained: bool) -> dict[str, Any]:
    """Return what remains to be computed for the test store."""
    config, place = replace(run.recipe.cache, top_k=None), Path(test_store_path(run.store))
    return plan_cache(config, place, teacher, [], test_context(run.context), trained=trained)


def run_plan(run: Run, with_probe: bool) -> dict[str, Any]:
    """Return what `cache-teacher` would do, and with `with_probe` an estimate of its time."""
    config, recipe = run.recipe.cache, run.recipe
    trained = teacher_folder(run.folder).result() is not None
    load = load_teacher if trained else untrained_teacher
    teacher = load(recipe.teacher, recipe.seed, run.context)
    required = run.required_features(teacher)
    plan = plan_cache(config, run.store, teacher, list(required), run.context, trained=trained)
    test_plan = _plan_test(run, teacher, trained=trained)
    plan |= {key: plan[key] + test_plan[key] for key in ("missing_bytes", "num_images")} | {"test_store": test_plan}
    timed = with_probe and plan["num_images"] > 0
    measured = probe(config, teacher, list(required), run.context, plan["num_images"]) if timed else None
    required_by = {feature.array: reasons for feature, reasons in required.items()}
    return {**plan, "teacher_trained": trained, "layers_required_by": required_by, "probe": measured}


def run_views(run: Run, num_samples: int, num_views: int) -> tuple[ViewPreview, str | None]:
    """Return some samples in their first views, with the predictions in the first store, and that store's path."""
    place = run.stores[0]
    if not is_url(place) and (not Path(place).exists() or read_store_manifest(Path(place)).finished is None):
        return show_views(run.context, None, num_samples, num_views), None
    store = open_with_views(local_store_path(place, run.monitor), run.context.view_identity(), {})
    return show_views(run.context, store, num_samples, num_views), str(place)


def try_distillation(run: Run, spec: DistillationSpec, student: StudentConfig) -> TrainingTask:
    """Build a first training task, so that errors and warnings come before any training."""
    seed = student.seeds[0]
    task = build_task(build_student(student, seed, run.context, spec.losses), spec, seed, run.context)
    if task.targets and task.targets.num_without_targets:
        count = f"{task.targets.num_without_targets:,} of {task.num_samples:,} samples have no targets"
        run.monitor.warn("train-student", f"{count}: they are trained on their labels alone.")
    return task


def require_losses(run: Run) -> None:
    """Raise RecipeError for a recipe without a distillation loss."""
    if not run.recipe.distill:
        raise RecipeError(
            f"the recipe {run.recipe.name} has no [[distill]]: add a loss (`kdpipe losses` lists them), or compare "
            "students without a teacher with `kdpipe compare`."
        )


def run_train_student(run: Run) -> dict[str, Any]:
    """Train each seed's student alone and distilled."""
    require_losses(run)
    spec, seeds = run.distillation, run.recipe.student.seeds
    if warning := view_warning(run.recipe.views):
        run.monitor.warn("train-student", warning)
    task = try_distillation(run, spec, run.recipe.student)
    for number, line in enumerate(task.targets.describe() if task.targets else (), 1):
        run.monitor.report(ProgressEvent("train-student", f"reads {line}", number, len(spec.stores), "store"))
    students: dict[str, list[dict[str, Any]]] = {ALONE: [], DISTILLED: []}
    for seed in seeds:
        students[ALONE].append(train_student(run.recipe.student, seed, None, run.context))
        students[DISTILLED].append(train_student(run.recipe.student, seed, spec, run.context))
    return {"students": students}


def run_compress(run: Run, only: Step | None = None) -> dict[str, Any]:
    """Prune, quantize and export the students, or do `only` one of these."""
    recipe, context = run.recipe, run.context
    config, student = recipe.compress, recipe.student
    steps = STEPS if only is None else (only,)
    if only in ("prune", "quantize") and only not in config.steps:
        raise RecipeError(f"--only {only}: compress.steps is {list(config.steps)}; add the step to the recipe.")
    if config.steps:
        require_losses(run)
    if not is_done(config, student, context.run_dir):
        dry_run(config, student, context)
    compressed = [compress(config, student, seed, run.distillation, context, only=steps) for seed in student.seeds]
    cards = []
    if "export" in steps:
        cards = [
            export_student(config, student, seed, run.distillation, context, name=recipe.name) for seed in student.seeds
        ]
    root = compressed_root(run.folder, config)
    folders = [str(artifact_folder(root, card["seed"])) for card in cards]
    artifacts = [{"folder": folder, **card} for folder, card in zip(folders, cards, strict=True)]
    return {"compressed": compressed, "artifacts": artifacts}


def run_sensitivity(run: Run, num_batches: int) -> tuple[str, list[LayerSensitivity]]:
    """Return the INT8 sensitivity of each layer of the first seed's float student, and that student's name."""
    config, student = run.recipe.compress, run.recipe.student
    tutor = FineTuneContext(
        student, student.seeds[0], run.distillation, run.context, compressed_root(run.folder, config)
    )
    return float_job(config, tutor).path.name, student_sensitivity(config, tutor, num_batches)


STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "train-teacher": run_train_teacher,
    "cache-teacher": run_cache_teacher,
    "train-student": run_train_student,
    "compress": run_compress,
}
"""All stages by command, in order."""


def run_all(run: Run) -> dict[str, Any]:
    """Run every stage; each skips finished work."""
    dry_run(run.recipe.compress, run.recipe.student, run.context)
    require_losses(run)
    run.check_losses()
    results: dict[str, Any] = {}
    for name, stage in STAGES.items():
        with run.phase(name):
            results |= stage(run)
    return results
