"""Stage 1, `kdpipe cache-teacher`: run the teacher once over every view and keep what it says in a target store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.background import Background
from stages.errors import RunError, StoppedEarly
from stages.features import Tap, tapped
from stages.forms import Wanted
from stages.network import Network
from stages.part import WHOLE, Part
from stages.pictures import Request
from stages.setup import Setup
from stages.store_plan import CacheConfig, layers_of, missing_bytes, plan_store, require_room, samples_in_row_order
from stages.teacher_rows import UnitRows, collect, speak, tapped_layers
from stages.watch import Event
from store import (
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
"""Units that may wait for the disk, beside the one that is being written and the one that the teacher speaks on."""


@dataclass(frozen=True)
class Task:
    """A unit that this process has claimed, with the arrays that it lacks."""

    unit: Unit
    lacking: tuple[str, ...]
    held: Claim


@dataclass(frozen=True)
class Filling:
    """A store that is being filled, and what it is filled from. `positions` int64 [N]: the data set's, row by row."""

    config: CacheConfig
    path: Path
    manifest: Manifest
    teacher: Network
    positions: Tensor
    setup: Setup


def cache_teacher(
    config: CacheConfig, path: Path, teacher: Network, layers: Sequence[Wanted], setup: Setup, *, part: Part = WHOLE
) -> dict[str, Any]:
    """Fill `part` of the store at `path` with the teacher's logits and what `layers` give, for every view.

    Several processes may do so at once: each claims the units that it computes, and whoever completes the last one
    finishes the store. A killed job's successor computes only what no marker says is done, and the store ends with
    the very bytes of an undisturbed run. A store that lacks views, samples or layers is extended in place.

    Returns the store's figures. Raises FingerprintMismatch if the store at `path` is another one, NotFiniteError
    naming the samples whose outputs are not finite, RunError if the disk is too small, LockedError naming who is at
    the units that are left, StoppedEarly, with all computed units committed, when the stop flag is set.
    """
    samples = samples_in_row_order(setup)
    wanted = plan_store(config, teacher, layers, samples, setup)
    require_room(path, missing_bytes(path, wanted, samples))
    manifest = ensure_store(path, wanted, samples)
    units = part.of(manifest.layout.units())
    return {
        **complete_units(config, path, manifest, units, teacher=teacher, setup=setup),
        "part": str(part) if part.count > 1 else None,
    }


def complete_units(
    config: CacheConfig, path: Path, manifest: Manifest, units: Sequence[Unit], *, teacher: Network, setup: Setup
) -> dict[str, Any]:
    """Compute what `units` of the store at `path`, whose manifest this is, still lack, and finish it if it is whole.

    The teacher, the views and the data set must be the store's own. Returns and raises what `cache_teacher` does.
    """
    filling = Filling(config, path, manifest, teacher, _positions(path, manifest, setup), setup)
    num_computed = _fill(filling, units)
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
    """What the encoding of a finished store lost, by array."""
    finished = read_store_manifest(path).finished
    return dict(finished.fidelity) if finished else {}


def _fill(filling: Filling, units: Sequence[Unit]) -> int:
    """Compute and commit those of `units` that are missing and that nobody else is at; returns how many those were."""
    path, manifest, watch = filling.path, filling.manifest, filling.setup.watch
    num_done = sum(not missing_arrays(path, manifest, unit) for unit in units)
    num_computed, wanted = 0, layers_of(manifest)

    def commit(computed: tuple[Task, UnitRows]) -> None:
        nonlocal num_computed
        task, said = computed
        try:
            arrays, lost = said.encode(manifest, task.lacking)
            metrics = {"unit_bytes": write_unit(path, manifest, task.unit, arrays, lost)}
        finally:
            task.held.release()
        num_computed += 1
        watch.report(Event("cache-teacher", path.name, num_done + num_computed, len(units), "unit", metrics))

    with (
        torch.no_grad(),
        tapped(filling.teacher.model, tapped_layers(wanted)) as tap,
        Background(commit, NUM_WAITING, lambda computed: computed[0].held.release()) as writer,
    ):
        try:
            for task in _claimed(path, manifest, units):
                writer.put((task, _listen(filling, tap, task, wanted)))
        except StoppedEarly:
            stopped = True  # what is computed is still written
        else:
            stopped = False
    if stopped:
        raise StoppedEarly
    return num_computed


def _claimed(path: Path, manifest: Manifest, units: Sequence[Unit]) -> Iterator[Task]:
    """Claim one missing unit after the other, leaving alone those that another job is at."""
    for unit in units:
        if not missing_arrays(path, manifest, unit):
            continue
        held = claim(path, unit.key)
        if isinstance(held, Claim):
            sweep_unit(path, manifest, unit)
            lacking = missing_arrays(path, manifest, unit)  # again: it may have been completed in between
            if lacking:
                yield Task(unit, lacking, held)
            else:
                held.release()


def _listen(filling: Filling, tap: Tap, task: Task, wanted: Sequence[Wanted]) -> UnitRows:
    """What the teacher says on a task's unit. Raises StoppedEarly between batches when the stop flag is set."""
    unit, setup = task.unit, filling.setup
    try:
        positions = filling.positions[unit.start : unit.stop]
        _require_known(filling.path, unit, positions)
        # Batches begin with the unit, so that its bytes are the same in every job.
        requests = [Request(at, unit.view) for at in torch.split(positions, filling.config.batch_size)]
        lacking = [one for one in wanted if one.array in task.lacking]
        batches = speak(tap, filling.teacher, requests, setup, lacking)
        return collect(batches, filling.manifest, unit, lacking)
    except BaseException:
        task.held.release()
        raise


def _require_known(path: Path, unit: Unit, positions: Tensor) -> None:
    if (positions < 0).any():
        raise RunError(
            f"{unit} of {path} holds samples that this recipe's data set lacks: complete the store with the recipe "
            "that began to extend it."
        )


def _positions(path: Path, manifest: Manifest, setup: Setup) -> Tensor:
    """Where the sample of each row stands in the data set, int64 [N]; -1 for rows without one, or one it lacks."""
    held = read_samples(path, manifest.layout, manifest.identity.data)
    positions = np.full(manifest.layout.num_rows, -1, np.int64)
    positions[manifest.layout.sample_rows()] = setup.samples.positions_of(held.ids)
    return torch.from_numpy(positions)


def _require_none_left(path: Path, left: AbstractSet[Unit]) -> None:
    """Raise LockedError, naming who is at them, if units of this process's part are another job's."""
    if left:
        first = min(left)
        at_it = holder(path, first.key) or "another job until a moment ago"
        raise LockedError(
            f"{len(left)} units of {path} are not done yet: {first} is being computed by {at_it}. All others of "
            "this job's are committed; run the same command again when that job is through."
        )
