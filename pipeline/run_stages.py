"""The stages of a recipe in its run folder, and their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kdpipe.pipeline.preflight import (
    preflight,
    require_export,
    require_losses,
    try_distillation,
)
from kdpipe.pipeline.recipe.load import faults_of_trainings
from kdpipe.pipeline.run import Run
from kdpipe.pipeline.shared_store import find_teacher, needs_teacher, shared_stores
from kdpipe.pipeline.steps import cache_teacher, compress_student, train_student, train_teacher
from kdpipe.stages.cache_teacher.plan import (
    missing_bytes,
    plan_store,
    samples_in_row_order,
)
from kdpipe.stages.compress.compress import STEPS, Step, dry_run, is_done
from kdpipe.stages.distillation.student_config import ALONE, DISTILLED, view_warning
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.runtime.cpu import lower_priority
from kdpipe.stages.runtime.events import ProgressEvent
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.tail_mass import report_tail, tail_of
from kdpipe.stages.teacher import (
    load_teacher,
    require_same_training,
)
from kdpipe.store import open_store


def run_train_teacher(run: Run) -> dict[str, Any]:
    """Train the teacher, or load its weights."""
    return {"teacher": train_teacher(run.recipe.teacher, run.recipe.seed, run.context)}


def run_cache_teacher(run: Run, *, in_turn: bool = False) -> dict[str, Any]:
    """Fill the stores of the training and of the test images with what the recipe's losses need.

    A store of another run of the workspace that has all of it is used instead. With `in_turn`, wait while another run
    fills one; without, several processes may fill this run's store together.
    """
    recipe, context = run.recipe, run.context  # the context loads the data and its views
    take_teacher(run)
    require_same_training(recipe.teacher, recipe.seed, context)
    teacher = load_teacher(recipe.teacher, recipe.seed, context)
    features = list(run.required_features(teacher))
    with shared_stores(run, teacher, features, in_turn=in_turn) as figures:
        return figures or _fill_stores(run, teacher, features)


def _fill_stores(run: Run, teacher: ModelBundle, features: Sequence[FeatureSpec]) -> dict[str, Any]:
    recipe, context = run.recipe, run.context
    beside = run.evaluation_stores(run.store)
    planned = [(run.store, context, recipe.cache, features)]
    planned += [(path, images, recipe.cache.for_test, []) for path, images in beside.values()]
    for path, images, config, layers in planned:  # all errors come before the long work
        samples = samples_in_row_order(images)
        missing_bytes(path, plan_store(config, teacher, layers, samples, images), samples)
    store = cache_teacher(recipe.cache, run.store, teacher, features, context, work_shard=run.work_shard)
    if recipe.cache.top_k and not store["num_units_missing"]:
        stored = open_store(run.store)
        for found in run.tail_masses(stored.manifest.top_k, tail_of(stored)):
            report_tail(found, "cache-teacher", run.monitor)
    config, shard = recipe.cache.for_test, run.work_shard
    return {"store": store} | {
        f"{part}_store": cache_teacher(config, path, teacher, [], images, work_shard=shard, like=run.store)
        for part, (path, images) in beside.items()
    }


def take_teacher(run: Run) -> bool:
    """Take the finished teacher of another run of the workspace, if this run has none; return whether it has one."""
    found = run.process_group.on_main(lambda: str(find_teacher(run) or ""))
    if found not in ("", str(run.folder)):
        run_train_teacher(run)
    return found != ""


def take_store(run: Run) -> None:
    """Use the finished store of another run of the workspace, with its teacher, if this run has none."""
    if run.has_stores or not take_teacher(run):
        return
    teacher = load_teacher(run.recipe.teacher, run.recipe.seed, run.context)
    with shared_stores(run, teacher, list(run.required_features(teacher)), in_turn=False):
        pass


def run_train_student(run: Run) -> dict[str, Any]:
    """Train each seed's student twice: on hard labels alone (unless student.baseline is false), and distilled."""
    require_losses(run)
    config, context = run.recipe.student, run.context  # load the data and its views
    take_store(run)
    spec = run.distillation  # open the stores; check them and the losses
    if warning := view_warning(run.recipe.views):
        run.monitor.warn("train-student", warning)
    if run.recipe.data.labels == "none":
        run.monitor.warn("train-student", "data.labels = 'none': no student is trained alone, as there are no labels.")
    if config.is_headless:
        run.monitor.warn(
            "train-student",
            "student.output = 'embeddings': no student is trained alone, and results are the share of an image's "
            "nearest neighbors that are the teacher's too.",
        )
    task = try_distillation(run, spec, config)
    for number, line in enumerate(task.targets.describe() if task.targets else (), 1):
        run.monitor.report(ProgressEvent("train-student", f"reads {line}", number, len(spec.stores), "store"))

    specs = {**({ALONE: None} if config.baseline else {}), DISTILLED: spec}
    students: dict[str, list[dict[str, Any]]] = {kind: [] for kind in specs}
    for seed in config.seeds:
        for kind, own in specs.items():
            students[kind].append(train_student(config, seed, own, context))
    return {"students": students}


def run_compress(run: Run, only: Step | None = None, *, is_tried: bool = False) -> dict[str, Any]:
    """Prune, quantize and export each seed's student, or do `only` one of these.

    Without `is_tried`, an untrained student is tried first.
    """
    recipe, context = run.recipe, run.context
    config, student = recipe.compress, recipe.student
    if only in ("prune", "quantize") and only not in config.steps:
        raise RecipeError(f"--only {only}: compress.steps is {list(config.steps)}; add the step to the recipe.")
    if config.steps:
        require_losses(run)
    require_export(student, config)
    if not is_tried and not is_done(config, student, context.run_dir):
        dry_run(config, student, recipe.distill, context)
    lower_priority(config.niceness)
    steps = STEPS if only is None else (only,)
    made = [
        compress_student(config, student, seed, run.distillation, context, steps=steps, name=recipe.name)
        for seed in student.seeds
    ]
    return {"compressed": [figures for figures, _ in made], "artifacts": [card for _, card in made if card is not None]}


STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "train-teacher": run_train_teacher,
    "cache-teacher": run_cache_teacher,
    "train-student": run_train_student,
    "compress": run_compress,
}
"""All stages by command, in order."""


def run_all(run: Run) -> dict[str, Any]:
    """Run every stage; each skips finished work. No teacher is trained for stores that are there already."""
    for fault in faults_of_trainings(run.recipe, imports=True):
        raise RecipeError(fault)
    require_losses(run)
    features = list(run.check_losses_fit())
    trains_teacher = needs_teacher(run, features)
    preflight(run, with_teacher=trains_teacher)
    stages: dict[str, Callable[[Run], dict[str, Any]]] = {
        **STAGES,
        "cache-teacher": partial(run_cache_teacher, in_turn=True),
        "compress": partial(run_compress, is_tried=True),
    }
    if not trains_teacher:
        stages = {name: stages[name] for name in ("train-student", "compress")}
    results: dict[str, Any] = {}
    for name, stage in stages.items():
        if name == "compress" and not run.recipe.student.export:
            run.monitor.warn(name, "student.export = false: nothing is compressed.")
            continue
        with run.phase(name):
            results |= stage(run)
    return results
