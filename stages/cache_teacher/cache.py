"""Stage 1, `kdpipe cache-teacher`: run the teacher over every view and cache its outputs in a target store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdpipe.stages.cache_teacher.inference import UnitOutputs, collect_unit, hooked_layers, iter_teacher_outputs
from kdpipe.stages.cache_teacher.plan import (
    CacheConfig,
    layers_of,
    missing_bytes,
    plan_store,
    require_room,
    samples_in_row_order,
)
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.loader.image_loader import ViewRequest
from kdpipe.stages.errors import RunError, StoppedEarly
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import FeatureExtractor, extract_features
from kdpipe.stages.runtime.background_worker import BackgroundWorker
from kdpipe.stages.runtime.events import ProgressEvent
from kdpipe.stages.runtime.launcher import ALL, WorkShard
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.store import (
    Claim,
    LockedError,
    Manifest,
    Unit,
    claim,
    ensure_store,
    finish_store,
    holder,
    missing_arrays,
    missing_units,
    read_samples,
    read_store_manifest,
    store_bytes,
    sweep_unit,
    write_unit,
)

NUM_WAITING = 2
"""Units that may wait for the disk, besides the one that is being written and the one that is being computed."""


@dataclass(frozen=True)
class UnitTask:
    """A unit that this process has claimed, and its missing arrays."""

    unit: Unit
    missing: tuple[str, ...]
    claim: Claim


@dataclass(frozen=True)
class CacheJob:
    """A store to fill and its inputs; `positions` int64 [N] are the rows' positions in the data set, -1 for none."""

    config: CacheConfig
    path: Path
    manifest: Manifest
    teacher: ModelBundle
    positions: Tensor
    context: StageContext


def cache_teacher(
    config: CacheConfig,
    path: Path,
    teacher: ModelBundle,
    layers: Sequence[FeatureSpec],
    context: StageContext,
    *,
    part: WorkShard = ALL,
) -> dict[str, Any]:
    """Fill `part` of the store at `path` with the teacher's logits and features, for every view.

    Several processes may do so at once: each claims the units that it computes, and the one that completes the last
    unit finishes the store. A rerun after a kill computes only units without a marker, and the store ends with the same
    bytes as an undisturbed run. A store that lacks views, samples or layers is extended in place.

    Returns the store's figures.

    Raises:
        FingerprintMismatch: The store at `path` was made from other inputs.
        NotFiniteError: Outputs are not finite; the message names the samples.
        RunError: The disk is too small.
        LockedError: Another job computes the remaining units; the message names it.
        StoppedEarly: The stop flag was set; all computed units are committed.
    """
    samples = samples_in_row_order(context)
    wanted = plan_store(config, teacher, layers, samples, context)
    require_room(path, missing_bytes(path, wanted, samples))
    manifest = ensure_store(path, wanted, samples)
    units = part.select(manifest.layout.units())
    return {
        **complete_units(config, path, manifest, units, teacher=teacher, context=context),
        "part": str(part) if part.count > 1 else None,
    }


def complete_units(
    config: CacheConfig,
    path: Path,
    manifest: Manifest,
    units: Sequence[Unit],
    *,
    teacher: ModelBundle,
    context: StageContext,
) -> dict[str, Any]:
    """Compute the missing arrays of `units` of the store at `path`, and finish the store if it is then complete.

    Teacher, views and data set must be the store's own. Returns and raises the same as `cache_teacher`.
    """
    job = CacheJob(config, path, manifest, teacher, _positions(path, manifest, context), context)
    num_computed = _fill(job, units)
    finish_store(path)
    missing = missing_units(path, manifest)
    _require_none_left(path, set(missing) & set(units))
    return {
        "path": str(path),
        "fingerprint": manifest.identity.fingerprint,
        "num_views": manifest.layout.num_views,
        "num_samples": manifest.layout.num_samples,
        "arrays": {spec.name: spec.to_json() for spec in manifest.arrays},
        "store_bytes": store_bytes(manifest, manifest.layout.units()),
        "num_units_computed": num_computed,
        "num_units_missing": len(missing),
        "fidelity": {} if missing else _fidelity(path),
    }


def _fidelity(path: Path) -> dict[str, Any]:
    """Return the encoding errors of a finished store, by array."""
    finished = read_store_manifest(path).finished
    return dict(finished.fidelity) if finished else {}


def _fill(job: CacheJob, units: Sequence[Unit]) -> int:
    """Compute and commit the missing units that no other job has claimed; returns their number."""
    path, manifest, monitor = job.path, job.manifest, job.context.monitor
    num_done = sum(not missing_arrays(path, manifest, unit) for unit in units)
    num_computed, wanted = 0, layers_of(manifest)

    def commit(computed: tuple[UnitTask, UnitOutputs]) -> None:
        nonlocal num_computed
        task, outputs = computed
        try:
            arrays, fidelity = outputs.encode(manifest, task.missing)
            metrics = {"unit_bytes": write_unit(path, manifest, task.unit, arrays, fidelity)}
        finally:
            task.claim.release()
        num_computed += 1
        monitor.report(ProgressEvent("cache-teacher", path.name, num_done + num_computed, len(units), "unit", metrics))

    with (
        torch.no_grad(),
        extract_features(job.teacher.model, hooked_layers(wanted)) as extractor,
        BackgroundWorker(commit, NUM_WAITING, lambda computed: computed[0].claim.release()) as writer,
    ):
        try:
            for task in _claimed(path, manifest, units):
                writer.submit((task, _compute(job, extractor, task, wanted)))
        except StoppedEarly:
            stopped = True  # computed units are still written
        else:
            stopped = False
    if stopped:
        raise StoppedEarly
    return num_computed


def _claimed(path: Path, manifest: Manifest, units: Sequence[Unit]) -> Iterator[UnitTask]:
    """Claim one missing unit after the other, skipping those of other jobs."""
    for unit in units:
        if not missing_arrays(path, manifest, unit):
            continue
        claimed = claim(path, unit.key)
        if isinstance(claimed, Claim):
            sweep_unit(path, manifest, unit)
            missing = missing_arrays(path, manifest, unit)  # again: it may have been completed in between
            if missing:
                yield UnitTask(unit, missing, claimed)
            else:
                claimed.release()


def _compute(job: CacheJob, extractor: FeatureExtractor, task: UnitTask, wanted: Sequence[FeatureSpec]) -> UnitOutputs:
    """Return the teacher's outputs on a unit; raises StoppedEarly between batches when the stop flag is set."""
    unit, context = task.unit, job.context
    try:
        positions = job.positions[unit.start : unit.stop]
        _require_known(job.path, unit, positions)
        # Batches begin with the unit, so that its bytes are the same in every job.
        requests = [ViewRequest(rows, unit.view) for rows in torch.split(positions, job.config.batch_size)]
        missing = [one for one in wanted if one.array in task.missing]
        batches = iter_teacher_outputs(extractor, job.teacher, requests, context, missing)
        return collect_unit(batches, job.manifest, unit, missing)
    except BaseException:
        task.claim.release()
        raise


def _require_known(path: Path, unit: Unit, positions: Tensor) -> None:
    if (positions < 0).any():
        raise RunError(
            f"{unit} of {path} has samples that are not in this recipe's data set: complete the store with the recipe "
            "that began to extend it."
        )


def _positions(path: Path, manifest: Manifest, context: StageContext) -> Tensor:
    """Return the position of each row's sample in the data set, int64 [N]; -1 for padding and for unknown samples."""
    stored = read_samples(path, manifest.layout, manifest.identity.data)
    positions = np.full(manifest.layout.num_rows, -1, np.int64)
    positions[manifest.layout.sample_rows()] = context.samples.positions_of(stored.ids)
    return torch.from_numpy(positions)


def _require_none_left(path: Path, left: AbstractSet[Unit]) -> None:
    """Raise LockedError, naming the other job, if it has claimed units of this process's part."""
    if left:
        first = min(left)
        owner = holder(path, first.key) or "another job, until just now"
        raise LockedError(
            f"{len(left)} units of {path} are not done yet: {first} is being computed by {owner}. All other units of "
            "this job are committed; run the same command again when that job has ended."
        )
