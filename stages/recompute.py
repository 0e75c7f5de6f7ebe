"""`kdpipe store verify --recompute`: does the teacher say what the store holds? Some samples are asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stages.features import tapped
from stages.forms import take_form
from stages.hard_labels import labels_of
from stages.network import Network
from stages.pictures import Request
from stages.setup import Setup
from stages.store_plan import layers_of, library_versions
from stages.teacher_rows import listen, tapped_layers
from store import StoreError, TargetStore, open_store
from store.format.manifest import require, version_note
from store.format.topk import INDICES, TAIL, VALUES, encode_topk

TOLERANCE = 1e-2
"""How far a number may be from the teacher's, as a part of the largest in its row. Rounding to float16 takes 5e-4 of
that, another batch size or device up to about 1e-3; another teacher's numbers differ by the whole of it."""

SMALLEST = 2.0**-24
"""The smallest step of float16: numbers in rows of nothing else are right to this."""

MASS_TOLERANCE = 1e-2
"""How far the mass of the logits that were not kept may be from the teacher's."""

BATCH_SIZE = 64


@dataclass(frozen=True)
class Differing:
    """A sample whose stored row is not what the teacher says: `error` is the largest difference in the row, as a part
    of what is tolerated."""

    sample_id: int
    view: int
    array: str
    error: float


@dataclass(frozen=True)
class Recomputed:
    """`num_rows` samples, each in one view, were asked for; `largest_error` is as in `Differing`, over all."""

    num_rows: int
    differing: tuple[Differing, ...]
    largest_error: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def recompute(path: Path, teacher: Network, setup: Setup, num_rows: int, seed: int) -> Recomputed:
    """Compare `num_rows` samples of the store at `path`, each in one view, both chosen by `seed`, with the teacher.

    Raises FingerprintMismatch where store and recipe do not even claim to have the same teacher and views, StoreError
    where the store is not finished, or none of its samples are in the recipe's data set.
    """
    store = open_store(path)
    advice = "Give the recipe and the run folder by which the store was made."
    advice += version_note(store.manifest.versions, library_versions())
    require(store.manifest, {"teacher": teacher.identity, "views": setup.view_identity()}, f"the store {path}", advice)
    rng = np.random.default_rng(seed)
    ids = rng.choice(store.samples.ids, min(num_rows, store.num_samples), replace=False)
    views = rng.integers(store.num_views, size=len(ids))
    differing: list[Differing] = []
    largest = 0.0
    for view in np.unique(views):
        chosen = np.sort(ids[views == view])
        for start in range(0, len(chosen), BATCH_SIZE):
            setup.watch.check()
            batch = chosen[start : start + BATCH_SIZE]
            for name, errors in _errors(store, teacher, setup, int(view), batch).items():
                largest = max(largest, float(errors.max()))
                bad = errors > 1.0
                differing += [
                    Differing(int(one), int(view), name, float(error))
                    for one, error in zip(batch[bad], errors[bad], strict=True)
                ]
    return Recomputed(len(ids), tuple(sorted(differing, key=lambda one: (one.sample_id, one.array))), largest)


@torch.no_grad()
def _errors(
    store: TargetStore, teacher: Network, setup: Setup, view: int, ids: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """By array, how far the rows of samples [n] are from the teacher's, [n]; 1 is just tolerated."""
    wanted = [one for one in layers_of(store.manifest) if one.array in {spec.name for spec in store.arrays}]
    at = torch.from_numpy(_positions(store, setup, ids))
    seen = setup.pictures.one(Request(at, view))
    with tapped(teacher.model, tapped_layers(wanted)) as tap:
        said = listen(tap, teacher, seen, wanted, labels_of(setup.pictures, seen))
    exact = {one.array: take_form(one, said.features[one.source]).float().cpu().numpy() for one in wanted}
    stored = {spec.name: store.gather(spec.name, view, ids) for spec in store.arrays}
    errors = {name: _row_errors(values, stored[name], _tolerance(store, name)) for name, values in exact.items()}
    return errors | _logit_errors(store, said.logits.float().cpu().numpy(), stored)


def _positions(store: TargetStore, setup: Setup, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where samples stand in the recipe's data set. Raises StoreError for those that it lacks."""
    at = setup.samples.positions_of(ids)
    if (at < 0).any():
        raise StoreError(
            f"{store.path} holds samples that this recipe's data set lacks, such as {ids[at < 0][:3].tolist()}: give "
            "the recipe by which it was made."
        )
    return at


def _tolerance(store: TargetStore, name: str) -> float:
    """TOLERANCE, and what rounding an archive's mantissas may have taken."""
    bits = store.manifest.rounded.get(name)
    return TOLERANCE + (0.0 if bits is None else 2.0**-bits)


def _row_errors(exact: NDArray[Any], stored: NDArray[Any], tolerance: float) -> NDArray[np.float64]:
    """The largest difference in each row [n, ...], as a part of what is tolerated there: [n]."""
    wanted = exact.reshape(len(exact), -1).astype(np.float64)
    held = stored.reshape(len(stored), -1).astype(np.float64)
    allowed = tolerance * np.abs(wanted).max(axis=1) + SMALLEST
    return np.asarray(np.abs(held - wanted).max(axis=1) / allowed)


def _logit_errors(
    store: TargetStore, logits: NDArray[np.float32], stored: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[np.float64]]:
    """The same for logits [n, C]. Of top-k logits, those at the stored classes are compared, and how much mass the rest
    has; a class that was kept must be one of the largest."""
    form = store.manifest.top_k
    if form is None:
        return {"logits": _row_errors(logits, stored["logits"], _tolerance(store, "logits"))}
    classes = np.minimum(stored[INDICES].astype(np.intp), form.num_classes - 1)
    kept = np.take_along_axis(logits, classes, axis=1)
    tolerance = _tolerance(store, VALUES)
    allowed = tolerance * np.abs(logits).max(axis=1) + SMALLEST
    least = np.sort(logits, axis=1)[:, -form.k]
    ours = encode_topk(logits, form, "float32")[TAIL]
    masses = [1.0 / (1.0 + np.exp(-tail.astype(np.float64))) for tail in (ours, stored[TAIL])]
    return {
        VALUES: np.abs(stored[VALUES].astype(np.float64) - kept).max(axis=1) / allowed,
        INDICES: np.maximum(least - kept.min(axis=1), 0.0).astype(np.float64) / allowed,
        TAIL: np.abs(masses[0] - masses[1]).max(axis=1) / MASS_TOLERANCE,
    }
