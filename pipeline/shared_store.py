"""Stores of other runs: whether one makes the teacher unnecessary, and whether one next to the run folder fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

from kdpipe.pipeline.recipe.load import all_losses
from kdpipe.pipeline.run import Run
from kdpipe.stages.cache_teacher.estimate import plan_cache
from kdpipe.stages.cache_teacher.plan import plan_store, samples_in_row_order
from kdpipe.stages.context import test_context
from kdpipe.stages.losses.features.simkd import SimKD
from kdpipe.stages.runtime.events import ProgressEvent
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.teacher import require_same_training, teacher_folder, teacher_identity, untrained_teacher
from kdpipe.store import KdpipeError, read_store_manifest
from kdpipe.store.format.identity import PLAIN

MAX_NEIGHBORS = 200
"""Folders next to the run folder that are looked at."""


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
    if is_made_here or recipe.teacher.train is None or not run.store.exists() or _reads_weights(run):
        return False
    teacher, test_config = untrained_teacher(recipe.teacher, recipe.seed, run.context), recipe.cache.for_test
    plans = [
        plan_cache(recipe.cache, run.store, teacher, features, run.context, trained=False),
        plan_cache(test_config, run.test_store, teacher, [], test_context(run.context), trained=False),
    ]
    return all(plan["exists"] and plan["num_images"] == 0 for plan in plans)


def _reads_weights(run: Run) -> bool:
    """Return whether a loss reads the teacher's own weights from the run folder."""
    losses = (loss for entry in all_losses(run.recipe).values() for loss in entry)
    return any(isinstance(loss, SimKD) and not loss.teacher for loss in losses)


def warn_of_neighbor(run: Run, features: Sequence[FeatureSpec]) -> None:
    """Name a store next to a new run folder that has the very outputs that would be computed again."""
    if run.recipe.cache.store or run.store.exists():
        return
    recipe, context = run.recipe, run.context
    teacher = untrained_teacher(recipe.teacher, recipe.seed, context)
    planned = plan_store(recipe.cache, teacher, features, samples_in_row_order(context), context)
    for path in _neighbors(run.folder):
        with suppress(KdpipeError, OSError):
            stored = read_store_manifest(path)
            beside = replace(context, run_dir=path.parent)
            require_same_training(recipe.teacher, recipe.seed, beside)
            own = {**stored.identity.teacher, **teacher_identity(recipe.teacher, beside)}
            has_all = {spec.name for spec in planned.arrays} <= {spec.name for spec in stored.arrays}
            compute = stored.identity.compute
            identity = replace(planned.identity, teacher=own, compute=compute)
            fits = planned.identity.compute.items() <= {**PLAIN, **compute}.items()
            if identity == stored.identity and fits and has_all and stored.finished:
                run.monitor.warn(
                    "cache-teacher",
                    f"{path} already has the outputs of this teacher for these views: to use them instead of computing "
                    f"them again, stop, and add --set cache.store={path}.",
                )
                return


def _neighbors(folder: Path) -> Iterator[Path]:
    """Yield the stores of the run folders next to `folder`."""
    own = folder.absolute()
    with suppress(OSError):  # a folder that cannot be listed
        stores = (path / "store.zarr" for path in sorted(own.parent.iterdir()) if path != own)
        yield from islice((store for store in stores if store.is_dir()), MAX_NEIGHBORS)
