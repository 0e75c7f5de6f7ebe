"""Fill a target store: run the teacher over the units that are missing, and commit them (`kdpipe cache-teacher`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.stages.cache_teacher.choice import compile_key_of
from kdpipe.stages.cache_teacher.collect import UnitOutputs, collect_unit
from kdpipe.stages.cache_teacher.inference import hooked_layers, iter_teacher_outputs
from kdpipe.stages.compute.threads import CheckedThreads, open_counts, threads
from kdpipe.stages.data.loader.image_loader import ImageLoader, ViewRequest
from kdpipe.stages.errors import RunError, StoppedEarly
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import FeatureExtractor, extract_features
from kdpipe.stages.runtime.background_worker import BackgroundWorker
from kdpipe.stages.runtime.cpu import num_cores
from kdpipe.stages.runtime.events import ProgressEvent, RunMonitor
from kdpipe.stages.targets.feature_spec import FeatureSpec, parse_statistic
from kdpipe.store import (
    Claim,
    LockedError,
    Manifest,
    Samples,
    Unit,
    claim,
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
    """A store to fill, the teacher, and the images in their views.

    Attributes:
        path: The store's folder.
        manifest: Its manifest.
        teacher: The teacher, in eval mode on the device.
        loader: The images, in the order of the data set.
        positions: int64 [N], the position in the data set of each row's sample; -1 for padding and for unknown samples.
        batch_size: Images that the teacher sees at once.
        monitor: Progress and the stop flag.
        head: The teacher's head [C, D + 1], if logits follow from it.
    """

    path: Path
    manifest: Manifest
    teacher: ModelBundle
    loader: ImageLoader
    positions: Tensor
    batch_size: int
    monitor: RunMonitor
    head: NDArray[np.float32] | None = None

    @property
    def num_threads(self) -> int:
        """The number of CPU threads of what may depend on it: the one that the trial recorded, one for small jobs."""
        recorded, counts = self.manifest.trial.get("threads"), open_counts()
        if type(recorded) is int and 1 <= recorded <= num_cores():
            return recorded
        return counts[-1 if self.manifest.trial or self.loader.device.type != "cpu" else 0]

    @cached_property
    def adaptive_threads(self) -> CheckedThreads | None:
        """The threads of the teacher's batches on a CPU; None where they have `num_threads`."""
        stays = self.loader.device.type != "cpu" or self.teacher.compute.compile
        return None if stays else CheckedThreads(self.num_threads)


def fill_store(job: CacheJob, units: Sequence[Unit]) -> dict[str, Any]:
    """Compute the missing arrays of `units`, and finish the store if it is then complete; return the store's figures.

    Several processes may do so at once: each claims the units that it computes, and the one that completes the last
    unit finishes the store. A rerun after a kill computes only units without a marker, and the store ends with the same
    bytes as an undisturbed run.

    Raises:
        NotFiniteError: Outputs are not finite; the message names the samples.
        LockedError: Another job computes the remaining units; the message names it.
        StoppedEarly: The stop flag was set; all computed units are committed.
    """
    path, manifest = job.path, job.manifest
    device = job.loader.device
    # The outer block keeps the weights that the passes cast, from batch to batch.
    with job.teacher.compute.placed(job.teacher.model), torch.autocast(device.type, enabled=False):
        num_computed = _fill(job, units)
    finish_store(path)
    missing = missing_units(path, manifest)
    _require_none_left(path, set(missing) & set(units))
    return {
        **store_figures(path, manifest),
        "num_units_computed": num_computed,
        "num_units_missing": len(missing),
        **({"fidelity": {}} if missing else {}),
    }


def store_figures(path: Path, manifest: Manifest | None = None) -> dict[str, Any]:
    """Return the figures of a store, which is finished where no `manifest` is given."""
    manifest = manifest or read_store_manifest(path)
    return {
        "path": str(path),
        "fingerprint": manifest.identity.fingerprint,
        "num_views": manifest.layout.num_views,
        "num_samples": manifest.layout.num_samples,
        "arrays": {spec.name: spec.to_json() for spec in manifest.arrays},
        "store_bytes": store_bytes(manifest, manifest.layout.units()),
        "num_units_computed": 0,
        "num_units_missing": 0,
        "compute": dict(manifest.identity.compute),
        "trial": dict(manifest.trial),
        "fidelity": _fidelity(path),
    }


def row_positions(path: Path, manifest: Manifest, samples: Samples) -> Tensor:
    """Return the position of each row's sample in the data set, int64 [N]; -1 for padding and for unknown samples."""
    stored = read_samples(path, manifest.layout, manifest.identity.data)
    positions = np.full(manifest.layout.num_rows, -1, np.int64)
    positions[manifest.layout.sample_rows()] = samples.positions_of(stored.ids)
    return torch.from_numpy(positions)


def layers_of(manifest: Manifest) -> list[FeatureSpec]:
    """Return the features that a store holds."""
    parts = [spec.name.partition("/") for spec in manifest.arrays]
    return [feature for kind, _, layer in parts if (feature := parse_statistic(layer, kind)) is not None]


def _fidelity(path: Path) -> dict[str, Any]:
    """Return the encoding errors of a finished store, by array."""
    finished = read_store_manifest(path).finished
    return dict(finished.fidelity) if finished else {}


def _fill(job: CacheJob, units: Sequence[Unit]) -> int:
    """Compute and commit the missing units that no other job has claimed; returns their number."""
    path, manifest, monitor = job.path, job.manifest, job.monitor
    num_done = sum(not missing_arrays(path, manifest, unit) for unit in units)
    num_computed, features = 0, layers_of(manifest)
    compile_key = compile_key_of(job.teacher, job.loader.device, monitor)

    def commit(computed: tuple[UnitTask, UnitOutputs]) -> None:
        nonlocal num_computed
        task, outputs = computed
        try:
            arrays, fidelity = outputs.encode(manifest, task.missing, job.head)
            metrics = {"unit_bytes": write_unit(path, manifest, task.unit, arrays, fidelity)}
        finally:
            task.claim.release()
        num_computed += 1
        monitor.report(ProgressEvent("cache-teacher", path.name, num_done + num_computed, len(units), "unit", metrics))

    with (
        torch.no_grad(),
        threads(job.num_threads),
        extract_features(job.teacher.model, hooked_layers(features), compile_key=compile_key) as extractor,
        BackgroundWorker(commit, NUM_WAITING, lambda computed: computed[0].claim.release()) as writer,
    ):
        try:
            for task in _claimed(path, manifest, units):
                writer.submit((task, _compute(job, extractor, task, features)))
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


def _compute(
    job: CacheJob, extractor: FeatureExtractor, task: UnitTask, features: Sequence[FeatureSpec]
) -> UnitOutputs:
    """Return the teacher's outputs on a unit; raises StoppedEarly between batches when the stop flag is set."""
    unit = task.unit
    try:
        positions = job.positions[unit.start : unit.stop]
        _require_known(job.path, unit, positions)
        # Batches begin with the unit, so that its bytes are the same in every job.
        requests = [ViewRequest(rows, unit.view) for rows in torch.split(positions, job.batch_size)]
        missing = [feature for feature in features if feature.array in task.missing]
        batches = iter_teacher_outputs(
            extractor,
            job.teacher,
            requests,
            job.loader,
            monitor=job.monitor,
            features=missing,
            threads=job.adaptive_threads,
        )
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


def _require_none_left(path: Path, left: AbstractSet[Unit]) -> None:
    """Raise LockedError, naming the other job, if it has claimed units of this process's part."""
    if left:
        first = min(left)
        owner = holder(path, first.key) or "another job, until just now"
        raise LockedError(
            f"{len(left)} units of {path} are not done yet: {first} is being computed by {owner}. All other units of "
            "this job are committed; run the same command again when that job has ended."
        )
