"""Teachers and stores of other runs: whether one makes the teacher unnecessary, and which one is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from kdpipe.pipeline.run import Run
from kdpipe.stages.cache_teacher.cache import store_figures
from kdpipe.stages.cache_teacher.estimate import plan_cache
from kdpipe.stages.cache_teacher.plan import plan_store, samples_in_row_order
from kdpipe.stages.given_teacher import is_as_expected
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.runtime.events import ProgressEvent
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.open import part_store_path
from kdpipe.stages.teacher import build_teacher, teacher_fingerprint, teacher_folder, untrained_teacher
from kdpipe.stages.training.shared_job import offered
from kdpipe.stages.workspace import shown, store_of_run
from kdpipe.store import KdpipeError, Manifest, Samples, plan_growth, read_store_manifest
from kdpipe.store.format.identity import PLAIN


def find_teacher(run: Run) -> Path | None:
    """Return the run folder that has the finished teacher, this one or another; None if it must be made."""
    config, seed, context = run.recipe.teacher, run.recipe.seed, run.context
    job_dir = teacher_folder(run.folder)
    if job_dir.result() is not None:
        return run.folder
    inputs = teacher_fingerprint(config, seed, build_teacher(config, seed, context), context)
    return offered(job_dir, inputs, context, partial(is_as_expected, config))


def needs_teacher(run: Run, features: Sequence[FeatureSpec]) -> bool:
    """Return whether the teacher has to be trained and cached: not if the students' stores are there and complete.

    A store that was made elsewhere is taken for that of the recipe's teacher; training checks its architecture.

    Raises:
        FingerprintMismatch: cache.store was made from other images or views.
    """
    if run.store not in run.stores:
        reason = "the students learn from student.stores"
    elif _is_cached(run, features):
        reason = f"{run.store} has its outputs"
    else:
        return True
    run.monitor.report(ProgressEvent("train-teacher", f"not needed: {reason}", 1, 1, "teacher"))
    return False


def _is_cached(run: Run, features: Sequence[FeatureSpec]) -> bool:
    """Return whether cache.store holds all outputs of a teacher that would otherwise be trained."""
    recipe = run.recipe
    is_made_here = not recipe.cache.store or teacher_folder(run.folder).path.exists()
    if is_made_here or recipe.teacher.train is None or not run.store.exists():
        return False
    teacher, test_config = untrained_teacher(recipe.teacher, recipe.seed, run.context), recipe.cache.for_test
    plans = [
        plan_cache(recipe.cache, run.store, teacher, features, run.context, trained=False),
        *(
            plan_cache(test_config, path, teacher, [], images, trained=False)
            for path, images in run.evaluation_stores(run.store).values()
        ),
    ]
    return all(plan["exists"] and plan["num_images"] == 0 for plan in plans)


@contextmanager
def shared_stores(
    run: Run, teacher: ModelBundle, features: Sequence[FeatureSpec], *, in_turn: bool
) -> Iterator[dict[str, Any] | None]:
    """Let the run use the stores of another run that have all that it needs; yield their figures, None without any.

    With `in_turn`, wait while another process of the workspace makes the same, and let others wait inside the block.
    """
    group, is_alone = run.process_group, run.workspace.folder is None and not run.used_stores
    if run.recipe.cache.store or is_alone or group.on_main(run.own_store.exists):
        yield None
        return
    samples = samples_in_row_order(run.context)
    planned = plan_store(run.recipe.cache, teacher, features, samples, run.context)
    choose = partial(_choose, run, teacher, planned, samples)
    with ExitStack() as turn:
        found = group.on_main(choose)
        if found is None and in_turn:
            what, inputs = "store of this teacher", planned.identity.to_json()
            turn.enter_context(run.workspace.turn("cache-teacher", what, inputs, run.monitor, group))
            found = group.on_main(choose)
        if found is None:
            group.on_main(partial(_forget, run))
            yield None
            return
        path = Path(found)
        run.monitor.report(ProgressEvent("cache-teacher", f"uses the store {shown(path)}", 1, 1, "store"))
        beside = {f"{part}_store": own for part, (own, _) in run.evaluation_stores(path).items()}
        yield {name: store_figures(one) for name, one in {"store": path, **beside}.items()}


def _choose(run: Run, teacher: ModelBundle, planned: Manifest, samples: Samples) -> str | None:
    """Find a store, and record that the run uses it."""
    with run.workspace.unchanged():  # a store that is found must not be removed before that is recorded
        if (path := _find(run, teacher, planned, samples)) is None:
            return None
        run.use_store(path)
        return str(path)


def _forget(run: Run) -> None:
    """Record that the run has its own store, in place of one that is gone."""
    for gone in run.used_stores:
        why = f"the store {shown(gone)} that this run used is not there, or has too little"
        run.monitor.warn("cache-teacher", f"{why}: {shown(run.own_store)} is made instead.")
        run.use_store(None)


def offered_store(run: Run, teacher: ModelBundle, features: Sequence[FeatureSpec]) -> Path | None:
    """Return the store of another run that this run would use in place of its own; None if there is none."""
    if run.recipe.cache.store or run.own_store.exists() or run.workspace.folder is None:
        return None
    samples = samples_in_row_order(run.context)
    return _find(run, teacher, plan_store(run.recipe.cache, teacher, features, samples, run.context), samples)


def _find(run: Run, teacher: ModelBundle, planned: Manifest, samples: Samples) -> Path | None:
    """Return a finished store of another run with all that is planned, beside those of the evaluated images."""
    beside = {}
    for part, (_, images) in run.evaluation_stores(run.store).items():
        own_samples = samples_in_row_order(images)
        beside[part] = plan_store(run.recipe.cache.for_test, teacher, [], own_samples, images), own_samples
    for path in dict.fromkeys([*run.used_stores, *map(store_of_run, run.workspace.runs(run.folder))]):
        with suppress(KdpipeError, OSError):  # none, of other inputs, damaged, or being removed
            if _has_all(path, planned, samples) and all(
                _has_all(Path(part_store_path(path, part)), *own) for part, own in beside.items()
            ):
                return path
    return None


def _has_all(path: Path, planned: Manifest, samples: Samples) -> bool:
    """Return whether a store is finished and has the very numbers that are planned, perhaps among others.

    Raises:
        KdpipeError: There is none, or it is of other inputs.
    """
    stored = read_store_manifest(path)
    done, computed = stored.finished, {**PLAIN, **stored.identity.compute}
    if done is None or stored.identity.teacher != planned.identity.teacher:
        return False
    if not stored.trial and computed != {**PLAIN, **planned.identity.compute}:  # another recipe asked for that
        return False
    names = {spec.name for spec in planned.arrays}
    is_whole = done.num_segments == len(stored.layout.segments) and done.num_views >= planned.layout.num_views
    return is_whole and names <= set(done.arrays) and plan_growth(path, stored, planned, samples)[0] == stored
