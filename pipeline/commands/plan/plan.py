"""Plan a run: what `cache-teacher` would do, what exists already, and what all stages cost."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdpipe.pipeline.commands.plan.costs import StageCost, student_costs, teacher_cost, total
from kdpipe.pipeline.commands.plan.existing import find_students
from kdpipe.pipeline.commands.plan.probe import SPREAD, Probe, Seconds, deciding_sample, probed_cache, sample_context
from kdpipe.pipeline.preflight import preflight
from kdpipe.pipeline.run import Run
from kdpipe.pipeline.session.run_record import peak_memory
from kdpipe.pipeline.shared_store import find_teacher, needs_teacher, offered_store
from kdpipe.stages.cache_teacher.choice import require_available
from kdpipe.stages.cache_teacher.estimate import first_logits, known_settings, plan_cache, probe
from kdpipe.stages.cache_teacher.plan import encoding_of
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.image_files import ImageFiles
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.tasks import CLASSIFICATION
from kdpipe.stages.errors import ModelError
from kdpipe.stages.evaluation.intervals import wilson
from kdpipe.stages.evaluation.metrics import EvalReport, evaluate_in_depth
from kdpipe.stages.given_teacher import findings, require_given
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.runtime.events import ProgressEvent
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.tail_mass import TailMass, tail_of
from kdpipe.stages.teacher import load_teacher, untrained_teacher
from kdpipe.stages.workspace import shown
from kdpipe.store import TopK, encode_topk, open_store
from kdpipe.store.format.encodings.topk import TAIL

MAX_TRIAL_S = 30.0
"""Time that trying scalings and class orders of a given teacher may take."""

MAX_TRIED = 1000
"""Test images on which a given teacher is examined, at most."""

TRIED_IMAGES = 2500
"""Passes of an image through the teacher that this takes, about."""


def run_plan(run: Run, with_probe: bool) -> dict[str, Any]:
    """Return what a run would do and what exists already, and with `with_probe` an estimate of its time."""
    config, recipe = run.recipe.cache, run.recipe
    found = find_teacher(run)
    load = load_teacher if found is not None else untrained_teacher
    teacher = load(recipe.teacher, recipe.seed, replace(run.context, run_dir=found or run.folder))
    require_given(recipe.teacher, teacher, run.context)
    required = run.required_features(teacher)
    try:
        require_available(config.precision, run.device)
        preflight(run)
    except ModelError as error:  # the store can be planned all the same
        run.monitor.warn("plan", f"`kdpipe run` would be refused: {error}")
    offered = offered_store(run, teacher, list(required)) if found is not None else None
    store, trained = offered or run.store, found is not None
    plan = plan_cache(config, store, teacher, list(required), run.context, trained=trained)
    for part, (path, images) in run.evaluation_stores(store).items():
        own = plan_cache(config.for_test, path, teacher, [], images, trained=trained)
        plan |= {key: plan[key] + own[key] for key in ("missing_bytes", "num_images")} | {f"{part}_store": own}
    tails = [str(mass) for mass in _tail_masses(run, teacher, plan)] if config.top_k and trained else []
    plan |= {
        "data": {image_set.split: _describe(image_set) for image_set in _image_sets(run)},
        "teacher": {"found": str(found) if found else None, "normalization": teacher.normalize.to_json()},
        "teacher_trained": trained,
        "layers_required_by": {feature.array: reasons for feature, reasons in required.items()},
        "tail_mass": tails,
        "probe": None,
    }
    return plan | _costs(run, teacher, list(required), plan) if with_probe else plan


def _costs(run: Run, teacher: ModelBundle, features: list[FeatureSpec], plan: dict[str, Any]) -> dict[str, Any]:
    """Return the times of all stages, and the memory, from a probe of each."""
    store, found = Path(plan["store"]), plan["teacher"]["found"]
    recipe = run.recipe
    distills = recipe.distill or recipe.compare or recipe.points or recipe.space or not recipe.cohort
    needed = distills and run.store in run.stores and (found is not None or needs_teacher(run, features))
    costs: list[StageCost] = []

    def add(cost: StageCost) -> None:
        costs.append(cost)
        done = ProgressEvent("plan", f"timed {cost.what}", len(costs), len(costs), "stage")
        run.monitor.report(done)

    with sample_context(run) as sample:
        measured = _probe_caching(run, teacher, features, plan, sample)
        times = Probe(run, sample, teacher, features, store)
        if needed:
            add(teacher_cost(times, Path(found) if found else None))
            add(_caching_cost(run, plan, measured))
        for cost in student_costs(times, find_students(run, store)):
            add(cost)
        notes = _try_given(run, teacher, sample)
    images = sum(map(_kept_bytes, _image_sets(run)))
    return {
        "probe": measured,
        "stages": [cost.to_json() for cost in costs],
        "wall_s": total(costs),
        "memory": {"images_bytes": images, **peak_memory()},
        "teacher": {**plan["teacher"], "notes": notes},
    }


def _probe_caching(
    run: Run, teacher: ModelBundle, features: list[FeatureSpec], plan: dict[str, Any], sample: StageContext
) -> dict[str, float] | None:
    if not plan["num_images"]:
        return None
    timed = replace(teacher, compute=known_settings(plan["compute"]))
    config = replace(run.recipe.cache, batch_size=plan["compute"]["batch_size"])
    return probe(probed_cache(config, sample), timed, features, sample, plan["num_images"])


def _caching_cost(run: Run, plan: dict[str, Any], measured: dict[str, float] | None) -> StageCost:
    wall_s = plan["num_images"] / measured["images_per_s"] if measured else 0.0
    store = Path(plan["store"])
    note = "" if store in (run.own_store, run.store) else shown(store)
    done = int(not plan["num_images"])
    return StageCost("cache-teacher", "store", 1, done, Seconds(wall_s, SPREAD * wall_s), note)


def _try_given(run: Run, teacher: ModelBundle, sample: StageContext) -> str:
    """Return what other scalings and class orders would reach with a given teacher, on a sample of the test images."""
    if run.recipe.teacher.train is not None or teacher.is_headless or not run.context.test_set.is_labeled:
        return ""
    started = time.monotonic()
    few = evaluate_in_depth(teacher.model, sample.evaluation(teacher.normalize), sample.device)
    if TRIED_IMAGES / few.num_samples * (time.monotonic() - started) > MAX_TRIAL_S:
        return f"{_reached(few)}; other input scalings and class orders are tried by `kdpipe train-teacher`"
    test = replace(sample, test_set=deciding_sample(run.context, MAX_TRIED)).evaluation(teacher.normalize)
    report = evaluate_in_depth(teacher.model, test, sample.device)
    more = findings(teacher, report, test)
    return f"{_reached(report)}. {more}" if more else _reached(report)


def _reached(report: EvalReport) -> str:
    """Return what a teacher reaches on a sample, with the interval of a share of its images."""
    text = f"it reaches {100 * report.top1:.1f} % {report.metric.title} on {report.num_samples:,} test images"
    if not report.metric.is_share:
        return text
    among = wilson(report.top1, report.num_samples).in_percent
    return f"{text} (95 % interval {among.low:.1f} to {among.high:.1f})"


def _image_sets(run: Run) -> list[ImageSet]:
    sets = (run.context.train_set, run.context.validation_set, run.context.test_set)
    return [image_set for image_set in sets if image_set is not None]


def _describe(image_set: ImageSet) -> dict[str, Any]:
    if image_set.targets is None:
        counts = torch.bincount(image_set.labels[image_set.labeled], minlength=image_set.num_classes).tolist()
    else:
        counts = (image_set.targets[image_set.labeled] == 1).sum(0).tolist()
    return {
        "name": image_set.name,
        "num_samples": image_set.num_samples,
        "num_labeled": len(image_set.labeled),
        "image_shape": [image_set.in_channels, *(image_set.image_size or ())],
        **({} if image_set.task == CLASSIFICATION else {"task": image_set.task}),
        "classes": dict(zip(image_set.class_names, counts, strict=True)),
    }


def _kept_bytes(image_set: ImageSet) -> int:
    """Return the bytes of the images that a run keeps in memory."""
    files = image_set.images
    if isinstance(files, ImageFiles):
        size = files.common_shape if files.levels is not None else None
        return len(files) * image_set.in_channels * size[0] * size[1] if size else 0
    return files.numel()


def _tail_masses(run: Run, teacher: ModelBundle, plan: dict[str, Any]) -> list[TailMass]:
    """Return the mass of the classes that the store does not keep, from the store, else from a first batch."""
    if plan["exists"] and not plan["num_units_missing"]:
        store = open_store(Path(plan["store"]))
        return run.tail_masses(store.manifest.top_k, tail_of(store))
    top_k = encoding_of(run.recipe.cache, run.context, teacher)
    logits = first_logits(run.recipe.cache, teacher, run.context)
    return [] if not isinstance(top_k, TopK) else run.tail_masses(top_k, encode_topk(logits, top_k, "float32")[TAIL])
