"""The teacher's forward passes over batches of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor

from kdpipe.stages.compute.threads import CheckedThreads
from kdpipe.stages.data.loader.image_loader import ImageBatch, ImageLoader, ViewRequest
from kdpipe.stages.data.loader.labels import HardLabels, hard_labels_of
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import FeatureExtractor, ModelOutput
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.runtime.memory import run_in_chunks
from kdpipe.stages.targets.feature_spec import INPUT_GRADIENT, FeatureSpec


def hooked_layers(features: Sequence[FeatureSpec]) -> list[str]:
    """Return the modules to hook for the required features."""
    return [feature.layer for feature in features if feature.source == feature.layer]


def teacher_forward(
    extractor: FeatureExtractor,
    teacher: ModelBundle,
    image_batch: ImageBatch,
    features: Sequence[FeatureSpec],
    hard: HardLabels | None,
) -> ModelOutput:
    """Run the teacher on images and return its logits and features, in chunks if they do not fit into memory.

    Features are those that `extractor` hooks and, under INPUT_GRADIENT if required, the gradient of the cross entropy
    with the labels `hard` by the pixels, [B, C, H, W].
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
    hard: HardLabels | None,
    *,
    warn: Callable[[str], None] | None = None,
    threads: CheckedThreads | None = None,
) -> Iterator[tuple[slice, ModelOutput]]:
    """Yield slices of the rows and their outputs, as many rows at once as fit into memory.

    Outputs of single samples do not depend on the others, so chunks differ from the whole by rounding. `warn` is as in
    `run_in_chunks`.
    """

    def run(rows: slice) -> tuple[slice, ModelOutput]:
        labels = hard.rows(rows) if hard is not None and needs_labels(features) else None
        images = image_batch.images[rows]
        compute, tensors = partial(forward, extractor, teacher, images, labels), attrgetter("tensors")
        return rows, threads.run_checked((*images.shape, labels is None), compute, tensors) if threads else compute()

    return run_in_chunks(teacher.model, len(image_batch.images), run, warn)


def needs_labels(features: Sequence[FeatureSpec]) -> bool:
    """Return whether a feature is the gradient of the loss with the labels."""
    return any(feature.source == INPUT_GRADIENT for feature in features)


def forward(extractor: FeatureExtractor, teacher: ModelBundle, images: Tensor, hard: HardLabels | None) -> ModelOutput:
    """Run the teacher on images uint8 [B, C, H, W] in one pass, as its `compute` says.

    With labels, also backward, and in float32. Outputs are float32 or wider.
    """
    normalized = teacher.compute.place_images(teacher.normalize(images))
    if hard is None:
        # Hooks detect layers that are overwritten by the versions of tensors, which inference mode does not count.
        without_grad = torch.no_grad() if extractor.layers else torch.inference_mode()
        folded = extractor.folded(normalized) if teacher.compute.folded else nullcontext()
        with without_grad, teacher.compute.active(images.device), folded:
            outputs = extractor(normalized)
        return outputs.to_float32()
    exact = replace(teacher.compute, precision="float32")  # gradients of single pixels fall below float16's range
    with torch.enable_grad(), exact.active(images.device):
        normalized.requires_grad_()
        outputs = extractor(normalized)
        (gradient,) = torch.autograd.grad(hard.losses(outputs.logits).sum(), normalized)
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
    threads: CheckedThreads | None = None,
) -> Iterator[tuple[Tensor, ModelOutput]]:
    """Yield ids, on the CPU, and outputs, batch by batch.

    If a batch does not fit into memory, it and later ones come in chunks, in the same order; as with another batch
    size, their last bits may differ.
    """
    warn = partial(monitor.warn, "cache-teacher")
    for image_batch in loader.stream(requests, require_all=True):
        monitor.check()
        ids = loader.dataset.sample_ids[image_batch.indices]
        labels = hard_labels_of(loader, image_batch) if needs_labels(features) else None
        for rows, outputs in teacher_forward_in_chunks(
            extractor, teacher, image_batch, features, labels, warn=warn, threads=threads
        ):
            yield ids[rows], outputs
