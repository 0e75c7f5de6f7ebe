"""What the teacher says about the rows of a unit, and how that becomes the arrays of a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.errors import NotFiniteError
from stages.features import Outputs, Tap
from stages.forms import INPUT_GRADIENT, Wanted, take_form
from stages.halving import in_parts
from stages.hard_labels import HardLabels, labels_of
from stages.network import Network
from stages.pictures import Request, Seen
from stages.setup import Setup
from store import Manifest, Unit, encode_topk, measure_dense, measure_features, measure_topk

MEASURED_ROWS = 64
"""Of a unit's features, so many rows are compared with what is stored of them."""


@dataclass(frozen=True)
class UnitRows:
    """The teacher's words on a unit: `logits` float32 [n, C]; `features` by array, [n, ...] in the store's type;
    `fidelity` of the features, by array.
    """

    unit: Unit
    logits: NDArray[np.float32]
    features: dict[str, NDArray[Any]]
    fidelity: dict[str, Any]

    def encode(self, manifest: Manifest, names: Sequence[str]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """The rows of the arrays `names` in the store's types, and what that loses."""
        rows = {name: self.features[name] for name in names if name in self.features}
        lost = {name: self.fidelity[name] for name in rows}
        wanted = [name for name in names if name not in self.features]
        if not wanted:
            return rows, lost
        dtype = _logits_dtype(manifest)
        if manifest.top_k is None:
            narrow = self.logits.astype(dtype)
            return {**rows, "logits": narrow}, {**lost, "logits": measure_dense(self.logits, narrow)}
        packed = encode_topk(self.logits, manifest.top_k, dtype)
        lost["logits"] = measure_topk(self.logits, packed, manifest.top_k)
        return {**rows, **{name: packed[name] for name in wanted}}, lost


def tapped_layers(wanted: Sequence[Wanted]) -> list[str]:
    """The modules to hook for what is wanted."""
    return [one.layer for one in wanted if one.source == one.layer]


def listen(tap: Tap, teacher: Network, seen: Seen, wanted: Sequence[Wanted], hard: HardLabels) -> Outputs:
    """What the teacher gives for pictures: logits, what `tap` hooks, and under INPUT_GRADIENT, where that is wanted,
    the gradient of its cross entropy with the labels by the pixels, [B, C, H, W]. Put together from parts where they do
    not fit into memory at once.
    """
    parts = [outputs for _, outputs in listen_in_parts(tap, teacher, seen, wanted, hard)]
    if len(parts) == 1:
        return parts[0]
    features = {layer: torch.cat([part.features[layer] for part in parts]) for layer in parts[0].features}
    return Outputs(torch.cat([part.logits for part in parts]), features)


def listen_in_parts(
    tap: Tap,
    teacher: Network,
    seen: Seen,
    wanted: Sequence[Wanted],
    hard: HardLabels,
    *,
    tell: Callable[[str], None] | None = None,
) -> Iterator[tuple[slice, Outputs]]:
    """The same, for some rows of the pictures after the others: for as many at once as fit into memory.

    All of it belongs to single samples, so parts differ from the whole by rounding. tell: as in `in_parts`.
    """

    def heard(rows: slice) -> tuple[slice, Outputs]:
        labels = hard.rows(torch.arange(rows.start, rows.stop, device=hard.labels.device))
        return rows, _listen_at_once(tap, teacher, seen.images[rows], wanted, labels)

    return in_parts(teacher.model, len(seen.images), heard, tell)


def _listen_at_once(
    tap: Tap, teacher: Network, pictures: Tensor, wanted: Sequence[Wanted], hard: HardLabels
) -> Outputs:
    """What the teacher gives for pictures uint8 [B, C, H, W], in one pass."""
    if all(one.source != INPUT_GRADIENT for one in wanted):
        return tap(teacher.normalise(pictures))
    with torch.enable_grad():
        images = teacher.normalise(pictures).requires_grad_()
        outputs = tap(images)
        (gradient,) = torch.autograd.grad(hard.cross_entropy(outputs.logits).sum(), images)
        features = {layer: feature.detach() for layer, feature in outputs.features.items()}
        features[INPUT_GRADIENT] = teacher.normalise.gradient_by_pixels(gradient)
        return Outputs(outputs.logits.detach(), features)


def speak(
    tap: Tap, teacher: Network, requests: Iterable[Request], setup: Setup, wanted: Sequence[Wanted] = ()
) -> Iterator[tuple[Tensor, Outputs]]:
    """Ids and outputs, batch by batch. One batch runs ahead of the one that is handed out: a GPU computes while the
    last batch is copied from it. A batch that does not fit into memory comes in parts, in the same order, and so do
    those behind it: the last bits of their numbers may be others, as with another batch size.
    """
    held: tuple[Tensor, Outputs] | None = None
    tell = partial(setup.watch.warn, "cache-teacher")
    for seen in setup.pictures.stream(requests, whole=True):
        setup.watch.check()
        ids = setup.train_set.sample_ids[seen.positions].to(setup.device, non_blocking=True)
        for rows, outputs in listen_in_parts(tap, teacher, seen, wanted, labels_of(setup.pictures, seen), tell=tell):
            if held is not None:
                yield held
            held = ids[rows], outputs
    if held is not None:
        yield held


def collect(
    batches: Iterator[tuple[Tensor, Outputs]], manifest: Manifest, unit: Unit, wanted: Sequence[Wanted]
) -> UnitRows:
    """The rows of a unit. Raises NotFiniteError, naming samples, for NaN, infinity, and what its type cannot hold."""
    logits: NDArray[np.float32] | None = None
    features = {one.array: _empty(manifest, one.array, unit) for one in wanted}
    lost: dict[str, Any] = {}
    start = 0
    for ids, outputs in batches:
        stop = start + len(ids)
        said = outputs.logits.float()
        _narrow("logits", said, _logits_dtype(manifest), ids, unit)
        if logits is None:
            logits = np.empty((unit.num_rows, said.shape[1]), np.float32)
        logits[start:stop] = said.cpu().numpy()
        for one in wanted:
            exact = take_form(one, outputs.features[one.source])
            narrow = _narrow(one.array, exact, manifest.spec(one.array).dtype, ids, unit).cpu().numpy()
            features[one.array][start:stop] = narrow
            if one.array not in lost:  # a unit's first rows stand for it: maps are large, and lose all alike
                lost[one.array] = measure_features(exact[:MEASURED_ROWS].float().cpu().numpy(), narrow[:MEASURED_ROWS])
        start = stop
    assert logits is not None, "a unit has at least one row"
    return UnitRows(unit, logits, features, lost)


def _empty(manifest: Manifest, name: str, unit: Unit) -> NDArray[Any]:
    spec = manifest.spec(name)
    return np.empty((unit.num_rows, *spec.row_shape), spec.dtype)


def _logits_dtype(manifest: Manifest) -> str:
    return manifest.spec("logits" if manifest.top_k is None else "logits/values").dtype


def _narrow(name: str, exact: Tensor, dtype: str, sample_ids: Tensor, unit: Unit) -> Tensor:
    """A batch of outputs [B, ...] in the store's type. Raises NotFiniteError, naming samples, for NaN and overflow."""
    narrow = exact.to(getattr(torch, dtype))
    # A sum is finite only if every part is, and is had in a tenth of the time; one that overflows is looked into.
    if torch.isfinite(narrow.sum(dtype=torch.float32)):
        return narrow
    bad = ~torch.isfinite(narrow).flatten(1).all(1)
    if bad.any():
        named = sample_ids[bad][:5].tolist()
        if torch.isfinite(exact).all():
            raise NotFiniteError(
                f"{name} of samples {named} in view {unit.view} reach {float(exact.abs().max()):.4g}, beyond {dtype}'s "
                "range: set cache.dtype = 'float32'."
            )
        raise NotFiniteError(
            f"the teacher gave NaN or infinity as {name} of samples {named} in view {unit.view}: "
            "look at these images and at the teacher's weights and normalisation."
        )
    return narrow
