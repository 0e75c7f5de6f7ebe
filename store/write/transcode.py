"""Transcode a store without the teacher: fewer views or arrays, narrower numbers, top-k, compressed or not.

The target has the same teacher, samples, views and fingerprints as the source. It is written unit by unit, one at a
time in memory; rows are joined by sample id and every source shard is checked against its committed crc32c. Progress
is recorded in the target's own markers, so a killed run continues, and a source that has grown extends its target.

A lossy change is measured against the source, since the teacher is not available. An array that stays as it is keeps
its figures under its name: they are against the teacher. One that changes has figures by step instead: "logits, step
1" is the loss of the first store against the teacher, "logits, step 2" that of the next store against the first, and
so on. Largest errors add up at most; divergences need not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import BitRound
from numpy.typing import NDArray

from kdpipe.store.errors import FingerprintMismatch, StoreError
from kdpipe.store.format.encodings.encoding_error import all_finite, measure_dense, measure_features, merge
from kdpipe.store.format.encodings.head import head_logits
from kdpipe.store.format.encodings.logit_encoding import measure_encoded
from kdpipe.store.format.encodings.quantized import PACKED
from kdpipe.store.format.encodings.quantized_maps import decode_features, is_quantized, quantize, range_array
from kdpipe.store.format.encodings.topk import VALUES, TopK, encode_topk
from kdpipe.store.format.layout import Unit
from kdpipe.store.format.manifest import EMBEDDINGS, Manifest
from kdpipe.store.format.samples import read_samples
from kdpipe.store.format.unit_state import committed, missing_arrays, store_state
from kdpipe.store.format.zarr_metadata import read_store_manifest
from kdpipe.store.read.open_store import open_store
from kdpipe.store.read.target_store import TargetStore
from kdpipe.store.write.claims import claimed
from kdpipe.store.write.extend import ensure_store
from kdpipe.store.write.transcode_options import MANTISSA_BITS, TranscodeOptions, logical_array, transcoded_manifest
from kdpipe.store.write.writer import finish_store, sweep_unit, write_unit


def transcode(
    source: Path,
    target: Path,
    options: TranscodeOptions,
    on_unit: Callable[[int, int], None] = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Write the store `target` from the finished part of `source`, or continue a killed run.

    Args:
        source: The store to read.
        target: The store to write, outside of `source`.
        options: The changes to make.
        on_unit: Called with (units done, units in all).
        should_stop: Checked before each unit.

    Returns:
        `complete` (False if stopped), `num_units`, the bytes of the committed shards `bytes_before` and `bytes_after`,
        and the target's `fidelity` once it is complete.

    Raises:
        StoreError: The source is incomplete or damaged, or the options do not apply to it.
        FingerprintMismatch, LockedError: The target is another store, or in use.
    """
    # Lock files use the target's name, and "." has none. realpath() takes a circle of links, resolve() raises.
    target = Path(os.path.realpath(target))
    _require_apart(Path(os.path.realpath(source)), target)
    if os.path.lexists(target):
        read_store_manifest(target)  # before a lock file is created beside something else
    store = open_store(source).streamed(0)
    wanted = transcoded_manifest(store, options)
    with claimed(target, "transcode", lambda holder: f"{target} is in use by {holder}; wait for it, or stop it first."):
        manifest = _ensure(target, wanted, store)
        complete = _fill(store, target, manifest, on_unit, should_stop)
        if complete:
            finish_store(target)
    after = store_state(target, manifest)
    return {
        "complete": complete,
        "num_units": after.num_units,
        "bytes_before": store_state(source, store.manifest).num_bytes,
        "bytes_after": after.num_bytes,
        "fidelity": dict(open_store(target).fidelity) if complete else {},
    }


def _fill(
    source: TargetStore,
    target: Path,
    manifest: Manifest,
    on_unit: Callable[[int, int], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Write every unit that the target lacks. Returns False if stopped."""
    samples = read_samples(target, manifest.layout, manifest.identity.data)
    units = manifest.layout.units()
    for done, unit in enumerate(units):
        on_unit(done, len(units))
        if should_stop():
            return False
        if missing_arrays(target, manifest, unit):
            sweep_unit(target, manifest, unit)
            first = int(np.searchsorted(manifest.layout.sample_rows(), unit.start))
            _transcode_unit(source, target, manifest, unit, samples.ids[first : first + unit.num_rows])
    on_unit(len(units), len(units))
    return True


def _require_apart(source: Path, target: Path) -> None:
    if source == target:
        raise StoreError(f"{target} is the source itself: a store is never changed in place, so give another target.")
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise StoreError(f"{source} and {target} are one within the other: give a target beside the source.")


def _ensure(target: Path, wanted: Manifest, source: TargetStore) -> Manifest:
    try:
        return ensure_store(target, wanted, source.samples, head=source.head if wanted.head else None)
    except FingerprintMismatch as error:
        raise FingerprintMismatch(
            f"the store {target}", error.differences, "Give another target, or delete this one and run again."
        ) from error


def _transcode_unit(
    source: TargetStore, target: Path, manifest: Manifest, unit: Unit, sample_ids: NDArray[np.int64]
) -> None:
    if unit.view >= source.num_views:
        raise StoreError(
            f"{target} has more views than {source.path}, which has {source.num_views}: give another target."
        )
    rows, errors = _convert(source, manifest, unit, sample_ids)
    inherited = _inherited(source, unit.view, source.rows_of(sample_ids))
    write_unit(target, manifest, unit, rows, _by_step(source, manifest, inherited, errors))


def _convert(
    source: TargetStore, manifest: Manifest, unit: Unit, sample_ids: NDArray[np.int64]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return the rows of a unit of the target by array, and the loss of each array that changes."""
    converted: dict[str, NDArray[Any]] = {}
    errors: dict[str, Any] = {}
    encoding, from_head = manifest.encoding, source.manifest.logits_from_head
    scores = measure_dense if source.manifest.task == "classification" else measure_features
    if isinstance(encoding, TopK):
        converted, errors = _convert_top_k(source, manifest, encoding, unit, sample_ids)
    elif not manifest.logits_from_head and (from_head or encoding != source.manifest.encoding):
        exact = source.logits(unit.view, sample_ids)
        encoded = encoding.encode(exact, "float32", sample_ids, unit.view) if encoding else {"logits": exact}
        for name, rows in encoded.items():
            converted[name] = _cast(rows, manifest, name, unit, sample_ids)
        errors["logits"] = (
            measure_encoded(exact, converted, encoding) if encoding else scores(exact, converted["logits"])
        )
    for spec in manifest.arrays:
        if spec.name in converted:
            continue
        before = source.manifest
        if is_quantized(spec) and spec not in before.arrays:
            exact = source.features(spec.name, unit.view, sample_ids).astype(np.float32)
            converted[spec.name], converted[range_array(spec.name)] = quantize(exact)
            errors[spec.name] = measure_features(exact, decode_features(converted, spec.name))
            continue
        decodes = spec.dtype != "uint8" and spec not in before.arrays
        stored = (source.features if decodes else source.gather)(spec.name, unit.view, sample_ids)
        converted[spec.name] = _cast(stored, manifest, spec.name, unit, sample_ids)
        if spec not in before.arrays or before.rounded.get(spec.name) != manifest.rounded.get(spec.name):
            measure = scores if spec.name == "logits" and stored.ndim == 2 else measure_features
            errors[logical_array(spec.name)] = measure(stored.astype(np.float32), converted[spec.name])
    if source.head is not None and manifest.logits_from_head and (EMBEDDINGS in errors or not from_head):
        exact = source.logits(unit.view, sample_ids)
        errors["logits"] = scores(exact, head_logits(converted[EMBEDDINGS], source.head))
    return converted, errors


def _convert_top_k(
    source: TargetStore, manifest: Manifest, top_k: TopK, unit: Unit, sample_ids: NDArray[np.int64]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return the top-k logits of a unit of the target, of those of the source or of all, and their loss."""
    before, stored = source.manifest, source.manifest.top_k
    if stored is None:
        exact = source.logits(unit.view, sample_ids)
        parts = encode_topk(exact, top_k, "float32")
    else:
        names = [spec.name for spec in stored.arrays(before.logits_dtype)]
        parts = stored.unpack({name: source.gather(name, unit.view, sample_ids) for name in names})
    values = _cast(parts[VALUES], manifest, PACKED, unit, sample_ids)
    converted = top_k.pack({**parts, VALUES: values})
    if stored is None:
        return converted, {"logits": measure_encoded(exact, converted, top_k)}
    rounded = before.rounded.get(PACKED if stored.dtype else VALUES)
    if values.dtype == parts[VALUES].dtype and rounded == manifest.rounded.get(PACKED):
        return converted, {}
    return converted, {"logits": measure_features(parts[VALUES].astype(np.float32), values)}


def _cast(rows: NDArray[Any], manifest: Manifest, name: str, unit: Unit, sample_ids: NDArray[np.int64]) -> NDArray[Any]:
    """Convert rows [n, ...] to the target's precision. Raises StoreError, naming samples, on overflow."""
    is_top_k = name == PACKED and manifest.top_k is not None
    dtype = manifest.logits_dtype if is_top_k else manifest.spec(name).dtype
    bits = manifest.rounded.get(name)
    with np.errstate(over="ignore"):  # overflow is reported below, by sample
        cast: NDArray[Any] = rows.astype(dtype)
    if bits is not None and bits < MANTISSA_BITS[dtype]:
        cast = BitRound(bits).encode(cast).view(dtype)
    if not all_finite(cast):
        bad = np.flatnonzero(~np.isfinite(cast.reshape(len(cast), -1)).all(axis=1))
        rounding = f" rounded to {bits} bits" if bits is not None else ""
        raise StoreError(
            f"{name} of {len(bad)} samples in view {unit.view}, for example ids {sample_ids[bad[:5]].tolist()}, is too "
            f"large for {dtype}{rounding} (largest {np.abs(rows).max():g}, {dtype} ends at {np.finfo(dtype).max:g}): "
            "ask for neither dtype nor keep_bits, and it stays as it is."
        )
    return cast


def _inherited(source: TargetStore, view: int, rows: NDArray[np.int64]) -> dict[str, Any]:
    """Merge the losses of those units of the source that begin in these rows: each then counts once in the target."""
    units = source.units(view)
    found: dict[str, list[Any]] = {}
    for shard in rows[rows % source.unit_rows == 0] // source.unit_rows:
        for name, figures in committed(source.path, source.manifest, units[shard]).fidelity.items():
            found.setdefault(name, []).append(figures)
    try:
        return {name: merge(figures) for name, figures in found.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{source.path} has a marker whose figures are damaged ({error}).") from error


def _by_step(
    source: TargetStore, manifest: Manifest, inherited: Mapping[str, Any], errors: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the figures of a unit: those of the source for arrays that are kept, followed by those of this step."""
    kept = {logical_array(spec.name) for spec in manifest.arrays} | ({"logits"} if manifest.has_logits else set())
    figures = {
        f"{name}, step 1" if name in errors else name: measured
        for name, measured in inherited.items()
        if name.partition(", ")[0] in kept
    }
    for name, measured in errors.items():
        before = sum(known.startswith(f"{name}, step ") for known in source.fidelity if known != f"{name}, step 1")
        figures[f"{name}, step {2 + before}"] = measured
    return figures
