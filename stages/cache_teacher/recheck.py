"""`kdpipe store verify --recompute`: compare stored rows of some samples with the teacher's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.stages.cache_teacher.cache import layers_of
from kdpipe.stages.cache_teacher.choice import is_available, settings_of
from kdpipe.stages.cache_teacher.inference import hooked_layers, teacher_forward
from kdpipe.stages.compute.settings import EXACT
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.loader.image_loader import ViewRequest
from kdpipe.stages.data.loader.labels import hard_labels_of
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import extract_features
from kdpipe.stages.runtime.versions import library_versions
from kdpipe.stages.targets.feature_spec import compute_statistic
from kdpipe.store import StoreError, TargetStore, open_store
from kdpipe.store.format.encodings.head import head_logits
from kdpipe.store.format.encodings.quantized import PACKED, Quantized
from kdpipe.store.format.encodings.quantized_maps import decode_features, range_array
from kdpipe.store.format.encodings.sampled import Sampled, probabilities, threshold
from kdpipe.store.format.encodings.topk import INDICES, TAIL, VALUES, TopK, encode_topk
from kdpipe.store.format.manifest import EMBEDDINGS, require, version_note

TOLERANCE = 1e-2
"""The tolerated difference from the teacher, relative to the largest number in the row.

Rounding to float16 takes 5e-4, another batch size or device up to about 1e-3; another teacher differs by about 1.
"""

BFLOAT16_TOLERANCE = 5e-2
"""The same for a teacher computed in bfloat16, whose rounding takes 4e-3 in each layer."""

SMALLEST = 2.0**-24
"""The smallest step of float16, the tolerance in rows of tiny numbers."""

MASS_TOLERANCE = 1e-2
"""The tolerated difference of the mass of the logits outside of the top k."""

BATCH_SIZE = 64


@dataclass(frozen=True)
class Mismatch:
    """A stored row that differs from the teacher's; `error` is the largest difference relative to the tolerance."""

    sample_id: int
    view: int
    array: str
    error: float


@dataclass(frozen=True)
class RecheckReport:
    """The result of comparing `num_rows` rows; `largest_error` is over all, as in `Mismatch`."""

    num_rows: int
    differing: tuple[Mismatch, ...]
    largest_error: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def recompute(path: Path, teacher: ModelBundle, context: StageContext, num_rows: int, seed: int) -> RecheckReport:
    """Compare `num_rows` samples of the store at `path`, each in one view, both drawn with `seed`, with the teacher.

    It is computed as the store's was, or in float32 where this device lacks that precision.

    Raises FingerprintMismatch if the store names another teacher or other views, StoreError if it is not finished, or
    has samples that are not in the recipe's data set.
    """
    store = open_store(path)
    advice = "Give the recipe and the run folder with which the store was made."
    advice += version_note(store.manifest.versions, library_versions())
    require(
        store.manifest, {"teacher": teacher.identity, "views": context.view_identity()}, f"the store {path}", advice
    )
    settings = settings_of(store.manifest)
    teacher = replace(teacher, compute=settings if is_available(settings.precision, context.device) else EXACT)
    rng = np.random.default_rng(seed)
    ids = rng.choice(store.samples.ids, min(num_rows, store.num_samples), replace=False)
    views = rng.integers(store.num_views, size=len(ids))
    differing: list[Mismatch] = []
    largest = 0.0
    for view in np.unique(views):
        chosen = np.sort(ids[views == view])
        for start in range(0, len(chosen), BATCH_SIZE):
            context.monitor.check()
            batch = chosen[start : start + BATCH_SIZE]
            for name, errors in _errors(store, teacher, context, int(view), batch).items():
                largest = max(largest, float(errors.max()))
                bad = errors > 1.0
                differing += [
                    Mismatch(int(sample_id), int(view), name, float(error))
                    for sample_id, error in zip(batch[bad], errors[bad], strict=True)
                ]
    differing.sort(key=lambda mismatch: (mismatch.sample_id, mismatch.array))
    return RecheckReport(len(ids), tuple(differing), largest)


@torch.no_grad()
def _errors(
    store: TargetStore, teacher: ModelBundle, context: StageContext, view: int, ids: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """Return the errors of the rows of samples [n] by array, [n]; 1 is just tolerated."""
    names = {spec.name for spec in store.arrays}
    features = [feature for feature in layers_of(store.manifest) if feature.array in names]
    positions = torch.from_numpy(_positions(store, context, ids))
    image_batch = context.train_loader.get(ViewRequest(positions, view))
    with (
        teacher.compute.placed(teacher.model),
        extract_features(teacher.model, hooked_layers(features)) as extractor,
    ):
        outputs = teacher_forward(
            extractor, teacher, image_batch, features, hard_labels_of(context.train_loader, image_batch)
        )
    exact = {
        feature.array: compute_statistic(feature, outputs.features[feature.source]).float().cpu().numpy()
        for feature in features
    }
    stored = {name: store.gather(name, view, ids) for name in names}
    errors = {name: _feature_errors(store, values, stored, name) for name, values in exact.items()}
    return errors | _logit_errors(store, outputs.logits.float().cpu().numpy(), stored)


def _positions(store: TargetStore, context: StageContext, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the samples' positions in the recipe's data set; raises StoreError for unknown samples."""
    positions = context.samples.positions_of(ids)
    if (positions < 0).any():
        raise StoreError(
            f"{store.path} has samples that are not in this recipe's data set, such as "
            f"{ids[positions < 0][:3].tolist()}: give the recipe with which it was made."
        )
    return positions


def _tolerance(store: TargetStore, name: str) -> float:
    """Return the tolerance of the teacher's precision plus the error of rounding an archive's mantissas."""
    bits = store.manifest.rounded.get(name)
    in_bfloat16 = settings_of(store.manifest).precision == "bfloat16"
    return (BFLOAT16_TOLERANCE if in_bfloat16 else TOLERANCE) + (0.0 if bits is None else 2.0**-bits)


def _row_errors(exact: NDArray[Any], stored: NDArray[Any], tolerance: float) -> NDArray[np.float64]:
    """Return the largest difference in each row [n, ...], relative to the tolerance: [n]."""
    expected = exact.reshape(len(exact), -1).astype(np.float64)
    found = stored.reshape(len(stored), -1).astype(np.float64)
    allowed = tolerance * np.abs(expected).max(axis=1) + SMALLEST
    return np.asarray(np.abs(found - expected).max(axis=1) / allowed)


def _feature_errors(
    store: TargetStore, exact: NDArray[Any], stored: Mapping[str, NDArray[Any]], name: str
) -> NDArray[np.float64]:
    """Return the errors of features [n, ...]; of maps in 8 bits a step is tolerated beside."""
    decoded, tolerance = decode_features(stored, name), _tolerance(store, name)
    if decoded is stored[name]:
        return _row_errors(exact, decoded, tolerance)
    largest = np.abs(exact).reshape(len(exact), -1).max(axis=1).astype(np.float64)
    step = stored[range_array(name)][:, 1].max(axis=1).astype(np.float64)
    errors = np.abs(decoded.astype(np.float64) - exact).reshape(len(exact), -1).max(axis=1)
    return np.asarray(np.nan_to_num(errors / (tolerance * largest + step + SMALLEST), nan=np.inf))


def _logit_errors(
    store: TargetStore, logits: NDArray[np.float32], stored: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[np.float64]]:
    """Return the errors of logits [n, C].

    Of top-k logits the stored classes and the mass of the rest are compared; a stored class must be one of the largest.
    """
    encoding = store.manifest.encoding
    if not store.manifest.has_logits:
        return {}
    if store.head is not None and store.manifest.logits_from_head:
        decoded = head_logits(stored[EMBEDDINGS], store.head)
        return {"logits": _row_errors(logits, decoded, _tolerance(store, EMBEDDINGS))}
    if encoding is None:
        return {"logits": _row_errors(logits, stored["logits"], _tolerance(store, "logits"))}
    if isinstance(encoding, Quantized):
        return {PACKED: _quantized_errors(encoding, logits, encoding.decode(stored), _tolerance(store, PACKED))}
    if isinstance(encoding, Sampled):
        return {PACKED: _sampled_errors(encoding, logits, stored[PACKED], _tolerance(store, PACKED))}
    tolerance = _tolerance(store, VALUES if encoding.dtype is None else PACKED)
    errors = _top_k_errors(encoding, logits, encoding.unpack(stored), tolerance)
    return errors if encoding.dtype is None else {PACKED: np.maximum.reduce(list(errors.values()))}


def _quantized_errors(
    encoding: Quantized, logits: NDArray[np.float32], decoded: NDArray[np.float32], tolerance: float
) -> NDArray[np.float64]:
    """Return the largest error of each row [n, C], relative to the tolerance and half the widest step of its range."""
    step = (logits.max(axis=1) - logits.min(axis=1)) * np.diff(encoding.places).max()
    allowed = tolerance * np.abs(logits).max(axis=1) + 0.5 * step.astype(np.float64) + SMALLEST
    errors = np.abs(decoded.astype(np.float64) - logits).max(axis=1) / allowed
    return np.asarray(np.nan_to_num(errors, nan=np.inf))


def _sampled_errors(
    encoding: Sampled, logits: NDArray[np.float32], packed: NDArray[np.uint8], tolerance: float
) -> NDArray[np.float64]:
    """Return the largest error of the log weights of each row, relative to the tolerance.

    Another class may be drawn where the teacher's last bits differ, with the same weight: the threshold.
    """
    values, classes = encoding.unpack(packed)
    masses = probabilities(logits)
    drawn = np.take_along_axis(masses, np.minimum(classes, encoding.num_classes - 1), axis=1)
    expected = np.log(np.maximum(drawn, threshold(masses, encoding.k)))
    allowed = tolerance * (np.abs(logits).max(axis=1) + np.abs(expected).max(axis=1)) + SMALLEST
    return np.asarray(np.nan_to_num(np.abs(values - expected).max(axis=1) / allowed, nan=np.inf))


def _top_k_errors(
    top_k: TopK,
    logits: NDArray[np.float32],
    stored: Mapping[str, NDArray[Any]],
    tolerance: float,
) -> dict[str, NDArray[np.float64]]:
    """Return the errors of values, of classes that are not among the largest, and of the mass of the rest."""
    classes = np.minimum(stored[INDICES].astype(np.intp), top_k.num_classes - 1)
    kept = np.take_along_axis(logits, classes, axis=1)
    allowed = tolerance * np.abs(logits).max(axis=1) + SMALLEST
    threshold = np.sort(logits, axis=1)[:, -top_k.k]
    tails = encode_topk(logits, top_k, "float32")[TAIL]
    masses = [1.0 / (1.0 + np.exp(-tail.astype(np.float64))) for tail in (tails, stored[TAIL])]
    return {
        VALUES: np.abs(stored[VALUES].astype(np.float64) - kept).max(axis=1) / allowed,
        INDICES: np.maximum(threshold - kept.min(axis=1), 0.0).astype(np.float64) / allowed,
        TAIL: np.abs(masses[0] - masses[1]).max(axis=1) / MASS_TOLERANCE,
    }
