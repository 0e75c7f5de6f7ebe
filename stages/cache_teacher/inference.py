"""Teacher inference on the rows of a unit, and conversion of the outputs to the arrays of a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.stages.data.loader.image_loader import ImageBatch, ImageLoader, ViewRequest
from kdpipe.stages.data.loader.labels import HardLabels, hard_labels_of
from kdpipe.stages.errors import NotFiniteError
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import FeatureExtractor, ModelOutput
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.runtime.memory import run_in_chunks
from kdpipe.stages.targets.feature_spec import INPUT_GRADIENT, FeatureSpec, compute_statistic
from kdpipe.store import Manifest, Unit, encode_topk, measure_dense, measure_features, measure_topk

MEASURED_ROWS = 64
"""Rows of a unit's features of which the encoding error is measured."""


@dataclass(frozen=True)
class UnitOutputs:
    """The teacher's outputs on a unit.

    Attributes:
        unit: The unit.
        logits: float32 [n, C].
        features: By array, [n, ...] in the store's type.
        fidelity: The encoding errors of the features, by array.
    """

    unit: Unit
    logits: NDArray[np.float32]
    features: dict[str, NDArray[Any]]
    fidelity: dict[str, Any]

    def encode(self, manifest: Manifest, names: Sequence[str]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return the rows of the arrays `names` in the store's types, and their encoding errors."""
        rows = {name: self.features[name] for name in names if name in self.features}
        fidelity = {name: self.fidelity[name] for name in rows}
        logits_arrays = [name for name in names if name not in self.features]
        if not logits_arrays:
            return rows, fidelity
        dtype = _logits_dtype(manifest)
        if manifest.top_k is None:
            stored = self.logits.astype(dtype)
            return {**rows, "logits": stored}, {**fidelity, "logits": measure_dense(self.logits, stored)}
        packed = encode_topk(self.logits, manifest.top_k, dtype)
        fidelity["logits"] = measure_topk(self.logits, packed, manifest.top_k)
        return {**rows, **{name: packed[name] for name in logits_arrays}}, fidelity


def hooked_layers(features: Sequence[FeatureSpec]) -> list[str]:
    """Return the modules to hook for the required features."""
    return [feature.layer for feature in features if feature.source == feature.layer]


def teacher_forward(
    extractor: FeatureExtractor,
    teacher: ModelBundle,
    image_batch: ImageBatch,
    features: Sequence[FeatureSpec],
    hard: HardLabels,
) -> ModelOutput:
    """Run the teacher on images and return its logits and features, in chunks if they do not fit into memory.

    Features are those that `extractor` hooks and, under INPUT_GRADIENT if required, the gradient of the cross entropy
    with the labels by the pixels, [B, C, H, W].
    """
    chunks = [outputs for _, outputs in teacher_forward_in_chunks(extractor, teacher, image_batch, features, hard)]
    if len(chunks) == 1:
        return chunks[0]
    joined = {layer: torch.cat([chunk.features[layer] for chunk in chunks]) for layer in chunks[0].features}
    return ModelOutput(torch.cat([chunk.logits for chunk in chunks]), joined)


def teacher_forward_in_chunks(
    extractor: FeatureExtractor,
    teacher: ModelBundle,
    image_batch: ImageBatch,
    features: Sequence[FeatureSpec],
    hard: HardLabels,
    *,
    warn: Callable[[str], None] | None = None,
) -> Iterator[tuple[slice, ModelOutput]]:
    """Yield slices of the rows and their outputs, as many rows at once as fit into memory.

    Outputs of single samples do not depend on the others, so chunks differ from the whole by rounding. `warn` is as in
    `run_in_chunks`.
    """

    def run(rows: slice) -> tuple[slice, ModelOutput]:
        labels = hard.rows(torch.arange(rows.start, rows.stop, device=hard.labels.device))
        return rows, forward(extractor, teacher, image_batch.images[rows], features, labels)

    return run_in_chunks(teacher.model, len(image_batch.images), run, warn)


def forward(
    extractor: FeatureExtractor, teacher: ModelBundle, images: Tensor, features: Sequence[FeatureSpec], hard: HardLabels
) -> ModelOutput:
    """Run the teacher on images uint8 [B, C, H, W] in one pass, as its `compute` says; outputs are float32 or wider."""
    normalized = teacher.compute.place_images(teacher.normalize(images))
    if all(feature.source != INPUT_GRADIENT for feature in features):
        # Hooks detect layers that are overwritten by the versions of tensors, which inference mode does not count.
        without_grad = torch.no_grad() if extractor.layers else torch.inference_mode()
        with without_grad, teacher.compute.active(images.device):
            outputs = extractor(normalized)
        return outputs.to_float32()
    torch.clear_autocast_cache()  # weights that were cast in inference mode have no gradient
    with torch.enable_grad(), teacher.compute.active(images.device):
        normalized.requires_grad_()
        outputs = extractor(normalized).to_float32()
        (gradient,) = torch.autograd.grad(hard.cross_entropy(outputs.logits).sum(), normalized)
        captured = {layer: feature.detach() for layer, feature in outputs.features.items()}
        captured[INPUT_GRADIENT] = teacher.normalize.to_pixel_gradient(gradient)
        return ModelOutput(outputs.logits.detach(), captured)


def iter_teacher_outputs(
    extractor: FeatureExtractor,
    teacher: ModelBundle,
    requests: Iterable[ViewRequest],
    loader: ImageLoader,
    *,
    monitor: RunMonitor,
    features: Sequence[FeatureSpec] = (),
) -> Iterator[tuple[Tensor, ModelOutput]]:
    """Yield ids and outputs, batch by batch, computing one batch ahead, while the last one is copied from the GPU.

    If a batch does not fit into memory, it and later ones come in chunks, in the same order; as with another batch
    size, their last bits may differ.
    """
    ready: tuple[Tensor, ModelOutput] | None = None
    warn = partial(monitor.warn, "cache-teacher")
    for image_batch in loader.stream(requests, require_all=True):
        monitor.check()
        ids = loader.dataset.sample_ids[image_batch.indices].to(loader.device, non_blocking=True)
        labels = hard_labels_of(loader, image_batch)
        for rows, outputs in teacher_forward_in_chunks(extractor, teacher, image_batch, features, labels, warn=warn):
            if ready is not None:
                yield ready
            ready = ids[rows], outputs
    if ready is not None:
        yield ready


def collect_unit(
    batches: Iterator[tuple[Tensor, ModelOutput]], manifest: Manifest, unit: Unit, required: Sequence[FeatureSpec]
) -> UnitOutputs:
    """Gather the rows of a unit; raises NotFiniteError, naming samples, for NaN, infinity and overflow."""
    logits: NDArray[np.float32] | None = None
    features = {feature.array: _empty(manifest, feature.array, unit) for feature in required}
    fidelity: dict[str, Any] = {}
    start = 0
    for ids, outputs in batches:
        stop = start + len(ids)
        batch_logits = outputs.logits.float()
        _to_stored("logits", batch_logits, _logits_dtype(manifest), ids, unit)
        if logits is None:
            logits = np.empty((unit.num_rows, batch_logits.shape[1]), np.float32)
        logits[start:stop] = batch_logits.cpu().numpy()
        for feature in required:
            exact = compute_statistic(feature, outputs.features[feature.source])
            stored = _to_stored(feature.array, exact, manifest.spec(feature.array).dtype, ids, unit).cpu().numpy()
            features[feature.array][start:stop] = stored
            if feature.array not in fidelity:  # the first rows represent the unit: maps are large, and errors alike
                sample = exact[:MEASURED_ROWS].float().cpu().numpy()
                fidelity[feature.array] = measure_features(sample, stored[:MEASURED_ROWS])
        start = stop
    assert logits is not None, "a unit has at least one row"
    return UnitOutputs(unit, logits, features, fidelity)


def _empty(manifest: Manifest, name: str, unit: Unit) -> NDArray[Any]:
    spec = manifest.spec(name)
    return np.empty((unit.num_rows, *spec.row_shape), spec.dtype)


def _logits_dtype(manifest: Manifest) -> str:
    return manifest.spec("logits" if manifest.top_k is None else "logits/values").dtype


def _to_stored(name: str, exact: Tensor, dtype: str, sample_ids: Tensor, unit: Unit) -> Tensor:
    """Convert outputs [B, ...] to the store's type; raises NotFiniteError, naming samples, for NaN and overflow."""
    stored = exact.to(getattr(torch, dtype))
    # A finite sum proves that all are finite, in a tenth of the time; an overflow of the sum is checked below.
    if torch.isfinite(stored.sum(dtype=torch.float32)):
        return stored
    bad = ~torch.isfinite(stored).flatten(1).all(1)
    if bad.any():
        named = sample_ids[bad][:5].tolist()
        if torch.isfinite(exact).all():
            raise NotFiniteError(
                f"{name} of samples {named} in view {unit.view} reach {float(exact.abs().max()):.4g}, beyond {dtype}'s "
                "range: set cache.dtype = 'float32'."
            )
        raise NotFiniteError(
            f"the teacher returned NaN or infinity as {name} of samples {named} in view {unit.view}: "
            "check these images and the teacher's weights and normalization."
        )
    return stored
