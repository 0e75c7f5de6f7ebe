"""Turning one store into another without the teacher: fewer views or arrays, narrower numbers, top-k, packed or not.

The target is a store of the same teacher, samples and views: its fingerprints are the source's. It is made unit by
unit, one at a time in memory, its rows joined to the source's by sample id and every source shard checked against its
committed crc32c. What is done stands in the target's own markers, so a killed run continues, and a source that has
grown since carries its target along.

A lossy change is measured against what the source holds, since the teacher is gone. An array that stays as it is keeps
its figures under its name: they are against the teacher. Of one that changes, no figure stands under its name any
more: "logits, step 1" is what the first store lost against the teacher, "logits, step 2" what the next store lost
against the first, and so on. Largest errors of steps add up at the most; divergences need not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import BitRound
from numpy.typing import NDArray

from store.write.transcode_options import MANTISSA_BITS, TranscodeOptions, logical_array, transcoded_manifest
from store.write.claims import Holder, claim
from store.errors import FingerprintMismatch, StoreError
from store.format.encoding_error import measure_dense, measure_features, measure_topk, merge
from store.format.layout import ArraySpec, StoreLayout, Unit
from store.write.extend import ensure_store
from store.fs.lock import LockedError
from store.format.manifest import Manifest
from store.format.markers import Marker, read_marker
from store.read.open_store import open_store
from store.read.target_store import TargetStore
from store.format.samples import Samples, read_samples
from store.format.topk import encode_topk
from store.write.writer import finish_store, missing_arrays, sweep_unit, write_unit
from store.format.zarr_metadata import read_store_manifest


def transcode(
    source: Path,
    target: Path,
    change: TranscodeOptions,
    on_unit: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Make the store `target` of the finished part of `source`, or continue that.

    `on_unit` hears how many units are done, of how many; before each, `should_stop` is asked. Returns `complete`
    (False where it was stopped), `num_units`, `bytes_before` and `bytes_after` (the shard files of the source that are
    finished, and of the target that are committed), and the target's `fidelity` once it is complete.

    Raises StoreError where the source is incomplete or damaged or the change impossible, FingerprintMismatch where
    the target is another store, LockedError where another process is transcoding to it.
    """
    target = _resolved(target)  # locks are named after it, and "." has no name
    _require_apart(_resolved(source), target)
    if os.path.lexists(target):
        read_store_manifest(target)  # before a lock is laid beside what is no store
    store = open_store(source).streamed(0)
    wanted = transcoded_manifest(store, change)
    with _alone_at(target):
        manifest = _ensure(target, wanted, store.samples)
        complete = _fill(store, target, manifest, on_unit, should_stop)
        if complete:
            finish_store(target)
    units_before = [unit for view in range(store.num_views) for unit in store.units(view)]
    units = manifest.layout.units()
    return {
        "complete": complete,
        "num_units": len(units),
        "bytes_before": _shard_bytes(source, store.manifest, units_before, store.arrays),
        "bytes_after": _shard_bytes(target, manifest, units, manifest.arrays),
        "fidelity": dict(open_store(target).fidelity) if complete else {},
    }


def _fill(
    source: TargetStore,
    target: Path,
    manifest: Manifest,
    on_unit: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Write every unit that the target lacks. Returns False where it was stopped before."""
    samples = read_samples(target, manifest.layout, manifest.identity.data)
    units = manifest.layout.units()
    for done, unit in enumerate(units):
        on_unit(done, len(units))
        if should_stop():
            return False
        if missing_arrays(target, manifest, unit):
            sweep_unit(target, manifest, unit)
            _transcode_unit(source, target, manifest, unit, _ids_of(unit, manifest.layout, samples))
    on_unit(len(units), len(units))
    return True


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (RuntimeError, OSError) as error:  # links that lead to each other; a name that is too long
        raise StoreError(f"{path} cannot be used: {error}.") from None


def _require_apart(source: Path, target: Path) -> None:
    if source == target:
        raise StoreError(f"{target} is the source itself: a store is never changed in place, so give another target.")
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise StoreError(f"{source} and {target} lie one within the other: give a target beside the source.")


@contextmanager
def _alone_at(target: Path) -> Iterator[None]:
    taken = claim(target, "transcode")
    if isinstance(taken, Holder):
        raise LockedError(f"{target} is in use by {taken}; wait for it, or stop it first.")
    try:
        yield
    finally:
        taken.release()


def _ensure(target: Path, wanted: Manifest, samples: Samples) -> Manifest:
    try:
        return ensure_store(target, wanted, samples)
    except FingerprintMismatch as error:
        raise FingerprintMismatch(
            f"the store {target}", error.differences, "Give another target, or delete this one to make it anew."
        ) from error


def _ids_of(unit: Unit, layout: StoreLayout, samples: Samples) -> NDArray[np.int64]:
    """The ids of a unit's samples, in the order of its rows: int64 [n]."""
    first = int(np.searchsorted(layout.sample_rows(), unit.start))
    return samples.ids[first : first + unit.num_rows]


def _transcode_unit(
    source: TargetStore, target: Path, manifest: Manifest, unit: Unit, sample_ids: NDArray[np.int64]
) -> None:
    if unit.view >= source.num_views:
        raise StoreError(
            f"{target} has more views than {source.path}, which has {source.num_views}: give another target."
        )
    rows, lost = _converted(source, manifest, unit, sample_ids)
    inherited = _inherited(source, unit.view, source.rows_of(sample_ids))
    write_unit(target, manifest, unit, rows, _by_step(source, manifest, inherited, lost))


def _converted(
    source: TargetStore, manifest: Manifest, unit: Unit, sample_ids: NDArray[np.int64]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The rows of a unit of the target by array, and what each array that changes loses."""
    made: dict[str, NDArray[Any]] = {}
    lost: dict[str, Any] = {}
    form = manifest.top_k if source.manifest.top_k is None else None
    if form:
        exact = source.gather("logits", unit.view, sample_ids).astype(np.float32)
        for name, rows in encode_topk(exact, form, "float32").items():
            made[name] = _fitted(rows, manifest, name, unit, sample_ids)
        lost["logits"] = measure_topk(exact, made, form)
    for spec in manifest.arrays:
        if spec.name in made:
            continue
        held = source.gather(spec.name, unit.view, sample_ids)
        made[spec.name] = _fitted(held, manifest, spec.name, unit, sample_ids)
        if _changes(source.manifest, manifest, spec):
            measure = measure_dense if spec.name == "logits" and held.ndim == 2 else measure_features
            lost[logical_array(spec.name)] = measure(held.astype(np.float32), made[spec.name])
    return made, lost


def _changes(source: Manifest, target: Manifest, spec: ArraySpec) -> bool:
    return spec not in source.arrays or source.rounded.get(spec.name) != target.rounded.get(spec.name)


def _fitted(
    rows: NDArray[Any], manifest: Manifest, name: str, unit: Unit, sample_ids: NDArray[np.int64]
) -> NDArray[Any]:
    """Rows [n, ...] in the target's precision. Raises StoreError, naming samples, where a number is too large."""
    dtype, bits = manifest.spec(name).dtype, manifest.rounded.get(name)
    with np.errstate(over="ignore"):  # what does not fit is refused below, by its samples
        fitted: NDArray[Any] = rows.astype(dtype)
    if bits is not None and bits < MANTISSA_BITS[dtype]:
        fitted = BitRound(bits).encode(fitted).view(dtype)
    if fitted.dtype.kind == "f" and not np.isfinite(fitted).all():
        bad = np.flatnonzero(~np.isfinite(fitted.reshape(len(fitted), -1)).all(axis=1))
        rounding = f" rounded to {bits} bits" if bits is not None else ""
        raise StoreError(
            f"{name} of {len(bad)} samples in view {unit.view}, for example ids {sample_ids[bad[:5]].tolist()}, is too "
            f"large for {dtype}{rounding} (largest {np.abs(rows).max():g}, {dtype} ends at {np.finfo(dtype).max:g}): "
            "ask for neither dtype nor keep_bits, and it stays as it is."
        )
    return fitted


def _inherited(source: TargetStore, view: int, rows: NDArray[np.int64]) -> dict[str, Any]:
    """What the source's units that begin in these rows of it lost, together: so each unit counts once in the target."""
    units = source.units(view)
    found: dict[str, list[Any]] = {}
    for shard in rows[rows % source.unit_rows == 0] // source.unit_rows:
        for name, figures in _marker(source.path, source.manifest, units[shard]).fidelity.items():
            found.setdefault(name, []).append(figures)
    try:
        return {name: merge(figures) for name, figures in found.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{source.path} has a marker whose figures are damaged ({error}).") from error


def _by_step(
    source: TargetStore, manifest: Manifest, inherited: Mapping[str, Any], lost: Mapping[str, Any]
) -> dict[str, Any]:
    """The figures of a unit: those of the source for arrays that are kept, and behind them those of this step."""
    kept = {logical_array(spec.name) for spec in manifest.arrays}
    figures = {
        f"{name}, step 1" if name in lost else name: measured
        for name, measured in inherited.items()
        if name.partition(", ")[0] in kept
    }
    for name, measured in lost.items():
        before = sum(known.startswith(f"{name}, step ") for known in source.fidelity if known != f"{name}, step 1")
        figures[f"{name}, step {2 + before}"] = measured
    return figures


def _shard_bytes(path: Path, manifest: Manifest, units: Sequence[Unit], specs: Sequence[ArraySpec]) -> int:
    """Bytes on disk of the shards that units have committed, in some arrays."""
    files = [_marker(path, manifest, unit).files for unit in units]
    return sum(committed[spec.name]["bytes"] for committed in files for spec in specs if spec.name in committed)


def _marker(path: Path, manifest: Manifest, unit: Unit) -> Marker:
    return read_marker(path, manifest, unit) or Marker({})
