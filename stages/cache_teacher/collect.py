"""Collect the rows of a unit: the teacher's outputs in the types of a store, on the host, and checked."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.stages.data.tasks import CLASSIFICATION
from kdpipe.stages.errors import NotFiniteError
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.runtime.gpu.transfers import Download, download, empty_on_host
from kdpipe.stages.targets.feature_spec import FeatureSpec, compute_statistic
from kdpipe.store import ArraySpec, Manifest, Unit, all_finite, measure_dense, measure_features
from kdpipe.store.format.encodings.head import head_logits
from kdpipe.store.format.encodings.logit_encoding import measure_encoded
from kdpipe.store.format.encodings.quantized_maps import decode_features, is_quantized, quantize, range_array
from kdpipe.store.format.manifest import EMBEDDINGS

MEASURED_ROWS = 64
"""Rows of a unit's features of which the encoding error is measured."""


@dataclass(frozen=True)
class _Batch:
    """Rows of a unit on their way to the host; `exact` is on the device, by array."""

    rows: slice
    ids: Tensor
    exact: dict[str, Tensor]
    copies: Download


@dataclass(frozen=True)
class UnitOutputs:
    """The teacher's outputs on a unit, on the host.

    Attributes:
        unit: The unit.
        sample_ids: int64 [n].
        logits: float32 [n, C]; [n, 0] if the store has none.
        features: By array, [n, ...] in the store's type.
        samples: By array, its first rows in float32: they represent the unit, as maps are large, and errors alike.
        waiting: Batches that have not been checked yet.
    """

    unit: Unit
    sample_ids: Tensor
    logits: Tensor
    features: dict[str, Tensor]
    samples: dict[str, Tensor]
    waiting: deque[_Batch] = field(default_factory=deque)

    @staticmethod
    def empty(manifest: Manifest, unit: Unit, logits: Tensor, features: Mapping[str, Tensor]) -> UnitOutputs:
        """Allocate the outputs of a unit, like those of its first batch."""

        def empty(like: Tensor, num_rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return empty_on_host((num_rows, *like.shape[1:]), dtype, like.device)

        stored = {name: empty(one, unit.num_rows, _dtype(manifest, name)) for name, one in features.items()}
        samples = {name: empty(one, min(len(one), MEASURED_ROWS)) for name, one in features.items()}
        sample_ids = torch.empty(unit.num_rows, dtype=torch.int64)
        return UnitOutputs(unit, sample_ids, empty(logits, unit.num_rows), stored, samples)

    def encode(
        self, manifest: Manifest, names: Sequence[str], head: NDArray[np.float32] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return the rows of the arrays `names` in the store's types, and their encoding errors.

        `head` [C, D + 1] is the teacher's, if logits follow from it.

        Raises:
            NotFiniteError: There is NaN, infinity or overflow; the message names samples.
        """
        while self.waiting:
            self.check_next(manifest)
        rows: dict[str, NDArray[Any]] = {}
        for name, values in self.features.items():
            rows |= _encoded(manifest.spec(name), values.numpy())
        fidelity = {name: self._measure(rows, name) for name in self.features}
        logits_arrays = [name for name in names if name not in rows]
        exact = self.logits.numpy()
        measure = measure_dense if manifest.task == CLASSIFICATION else measure_features
        if head is not None and EMBEDDINGS in rows:
            fidelity["logits"] = measure(exact, head_logits(rows[EMBEDDINGS], head))
        if not logits_arrays:
            return rows, fidelity
        encoding = manifest.encoding
        if encoding is None:
            stored = self.logits.to(_dtype(manifest, "logits")).numpy()
            return {**rows, "logits": stored}, {**fidelity, "logits": measure(exact, stored)}
        encoded = encoding.encode(exact, manifest.logits_dtype, self.sample_ids.numpy(), self.unit.view)
        fidelity["logits"] = measure_encoded(exact, encoded, encoding)
        return {**rows, **{name: encoded[name] for name in logits_arrays}}, fidelity

    def check_next(self, manifest: Manifest) -> None:
        """Wait for the rows of the next batch; raises NotFiniteError if some are not finite in the store's type."""
        batch = self.waiting.popleft()
        batch.copies.wait()
        logits = self.logits[batch.rows].to(_dtype(manifest, "logits"))
        stored = {"logits": logits, **{name: values[batch.rows] for name, values in self.features.items()}}
        for name, values in stored.items():
            if not all_finite(values.numpy()):
                raise _not_finite(name, values, batch.exact[name], batch.ids, self.unit)

    def _measure(self, rows: Mapping[str, NDArray[Any]], name: str) -> dict[str, Any]:
        sample = self.samples[name].numpy()
        stored = decode_features({key: values[: len(sample)] for key, values in rows.items()}, name)
        return measure_features(sample, torch.from_numpy(stored).float().numpy())  # numpy's conversion takes longer


def collect_unit(
    batches: Iterator[tuple[Tensor, ModelOutput]], manifest: Manifest, unit: Unit, required: Sequence[FeatureSpec]
) -> UnitOutputs:
    """Gather the rows of a unit, each batch copied from a GPU, and checked, while the next one is computed.

    The last one may still be on its way: `encode` waits for it, so that the next unit can begin.

    Raises:
        NotFiniteError: There is NaN, infinity or overflow; the message names samples.
    """
    outputs: UnitOutputs | None = None
    start = 0
    for ids, found in batches:
        logits = found.logits if manifest.has_logits else found.logits[:, :0]
        exact = {feature.array: compute_statistic(feature, found.features[feature.source]) for feature in required}
        if outputs is None:
            outputs = UnitOutputs.empty(manifest, unit, logits, exact)
        outputs.sample_ids[start : start + len(ids)] = ids
        outputs.waiting.append(_send(outputs, slice(start, start + len(ids)), ids, {"logits": logits.float(), **exact}))
        start += len(ids)
        if len(outputs.waiting) > found.logits.is_cuda:
            outputs.check_next(manifest)
    assert outputs is not None, "a unit has at least one row"
    return outputs


def _send(outputs: UnitOutputs, rows: slice, ids: Tensor, exact: dict[str, Tensor]) -> _Batch:
    """Begin to copy the rows of a batch."""
    copies = [(outputs.logits[rows], exact["logits"])]
    copies += [(stored[rows], exact[name]) for name, stored in outputs.features.items()]
    if not rows.start:
        copies += [(sample, exact[name][: len(sample)]) for name, sample in outputs.samples.items()]
    return _Batch(rows, ids, exact, download(copies, exact["logits"].device))


def _encoded(spec: ArraySpec, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Return the arrays of features in the store's type, or of maps that it has in 8 bits."""
    if not is_quantized(spec):
        return {spec.name: values}
    return dict(zip((spec.name, range_array(spec.name)), quantize(values), strict=True))


def _dtype(manifest: Manifest, name: str) -> torch.dtype:
    if name == "logits" and (manifest.logits_from_head or not manifest.has_logits):
        return torch.float32
    if name != "logits" and is_quantized(manifest.spec(name)):
        return torch.float32  # quantized by `encode`
    dtype: torch.dtype = getattr(torch, manifest.logits_dtype if name == "logits" else manifest.spec(name).dtype)
    return dtype


def _not_finite(name: str, stored: Tensor, exact: Tensor, sample_ids: Tensor, unit: Unit) -> NotFiniteError:
    """Return the error for rows [n, ...] of the store's type, not all finite; `exact` is what they were."""
    named = sample_ids[~torch.isfinite(stored).flatten(1).all(1)][:5].tolist()
    if torch.isfinite(exact).all():
        return NotFiniteError(
            f"{name} of samples {named} in view {unit.view} reach {float(exact.abs().max()):.4g}, beyond "
            f"{str(stored.dtype).removeprefix('torch.')}'s range: set cache.dtype = 'float32' alone."
        )
    return NotFiniteError(
        f"the teacher returned NaN or infinity as {name} of samples {named} in view {unit.view}: "
        "check these images and the teacher's weights and normalization; a teacher that is computed in float16 needs "
        "cache.precision = 'float32' and another store."
    )
