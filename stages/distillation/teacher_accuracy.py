"""Teacher logits and embeddings of the test images, and the accuracies that weigh teachers, from their stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kdpipe.stages.context import StageContext, test_context
from kdpipe.stages.data.image_set import UNLABELED
from kdpipe.stages.data.splits import VALIDATION, Part
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.evaluation.evaluate import BATCH_SIZE
from kdpipe.stages.models.tokens import PRE_LOGITS
from kdpipe.stages.targets.class_map import SAME, ClassMapConfig
from kdpipe.stages.targets.ensemble import TeacherEnsemble, TeachersConfig
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.join import JoinedStore, join
from kdpipe.stages.targets.open import local_store_path, open_with_views, part_store_path
from kdpipe.stages.targets.reader import TargetLoadingConfig, Targets
from kdpipe.store import FingerprintMismatch, StoreError, read_store_manifest

TEST_LOADING = TargetLoadingConfig(device_bytes=0, memory_bytes=2**30, mapped_bytes=2**60)
"""Larger test stores are memory-mapped: those of 20,000 classes would fill the memory."""


@dataclass(frozen=True)
class TeacherLogits:
    """The combined logits of the teachers for test images, read batch by batch.

    Attributes:
        nan_without: Whether test images without targets get rows of NaN.
    """

    targets: Targets
    ensemble: TeacherEnsemble
    labels: Tensor
    nan_without: bool

    @torch.no_grad()
    def __call__(self, positions: Tensor) -> Tensor:
        """Return the logits float32 [B, C] of the test images at `positions`, int64 [B]."""
        outputs, masks = self.targets.batch(0, positions), self.targets.target_masks(positions)
        logits: Tensor = self.ensemble(outputs, masks, self.labels[positions]).logits_at(1.0).float()
        if self.nan_without:
            logits[~torch.stack([mask for mask in masks if mask is not None]).any(0)] = float("nan")
        return logits


def teacher_logits(
    stores: Sequence[Path | str], config: TeachersConfig, context: StageContext, part: Part = "test"
) -> TeacherLogits | None:
    """Open the combined logits of the teachers for the test or the validation images.

    Args:
        stores: Paths or URLs of the training stores.
        config: The `student.teachers` section.
        context: The stage context.
        part: The images.

    Returns:
        The logits; None if a store has no finished store of these images beside it, or has embeddings.
    """
    images = context if part == "test" else context.deciding
    sources = _sources(stores, config, images, part)
    if sources is None or not all(source.store.manifest.has_logits for source in sources):
        return None
    # Learned weights belong to one student, and confidence weights need labels, which a test must not use.
    config = replace(config, weights="equal") if config.weights in ("learnable", "confidence") else config
    accuracies = deciding_accuracies(stores, config, context) if config.weights == "accuracy" else None
    targets, ensemble = _targets(sources), TeacherEnsemble(config, len(sources), accuracies)
    some = targets.target_masks(torch.arange(1))
    logits = TeacherLogits(targets, ensemble, images.test_set.labels, all(mask is not None for mask in some))
    logits(torch.arange(1))  # a damaged store is found before the training
    return logits


EMBEDDING = FeatureSpec(PRE_LOGITS)


@dataclass(frozen=True)
class TeacherEmbeddings:
    """The embeddings of a teacher for test images, read batch by batch; rows of NaN for images without any."""

    targets: Targets

    @torch.no_grad()
    def __call__(self, positions: Tensor) -> Tensor:
        """Return the embeddings float32 [B, D] of the test images at `positions`, int64 [B]."""
        vectors = self.targets.features(0, 0, positions, [EMBEDDING])[EMBEDDING]
        mask = self.targets.target_masks(positions)[0]
        return vectors if mask is None else vectors.masked_fill(~mask[:, None], float("nan"))


def teacher_embeddings(
    stores: Sequence[Path | str], context: StageContext, part: Part = "test"
) -> TeacherEmbeddings | None:
    """Open the embeddings of the first teacher without a classifier, for the test or the validation images.

    None, with a warning, if there are none.
    """
    images = context if part == "test" else context.deciding
    manifests = (read_store_manifest(local_store_path(place, context.monitor)) for place in stores)
    for place, manifest in zip(stores, manifests, strict=True):
        if not manifest.has_logits:
            try:
                return TeacherEmbeddings(_targets([_source(place, SAME, images, part, [EMBEDDING])]))
            except (StoreError, FingerprintMismatch) as error:
                context.monitor.warn(
                    "test", f"the teacher's embeddings of the {part} images are not available: {error}"
                )
    return None


def deciding_accuracies(stores: Sequence[Path | str], config: TeachersConfig, context: StageContext) -> list[float]:
    """Return each teacher's accuracy on the validation images, or without any, and with a warning, the test images.

    Raises:
        RecipeError: A store of these images is missing, or has no logits.
    """
    part: Part = "test" if context.validation_set is None else VALIDATION
    if part == "test" and len(stores) > 1:
        context.monitor.warn_once(
            "train-student",
            "student.teachers.weights = 'accuracy' weighs the teachers by their accuracy on the test images, which "
            "then show a student too good: set data.validation_share where the stores are made, and here.",
        )
    if not context.deciding.test_set.has_labels:
        raise RecipeError(
            f"student.teachers.weights = 'accuracy' needs labels, and no {part} image has one: give the weights as "
            "numbers, or use 'equal'."
        )
    sources = _sources(stores, config, context.deciding, part)
    if sources is None:
        raise RecipeError(
            f"student.teachers.weights = 'accuracy' needs each teacher's accuracy on these {part} images, but not "
            f"every store has a {part} store (store.{part}.zarr) of them beside it: run `kdpipe cache-teacher` again "
            "where the stores were made, or give the weights as numbers."
        )
    if without := [source.store.path for source in sources if not source.store.manifest.has_logits]:
        raise RecipeError(f"student.teachers.weights = 'accuracy': {without[0]} has embeddings, no logits.")
    return _accuracies(sources, context.deciding)


def _sources(
    stores: Sequence[Path | str], config: TeachersConfig, context: StageContext, part: Part
) -> list[JoinedStore] | None:
    """Return the test stores, joined to the test images; None, with a warning, if one is not available."""
    try:
        return [_source(path, config.class_map(number), context, part) for number, path in enumerate(stores)]
    except (StoreError, FingerprintMismatch) as error:
        context.monitor.warn("test", f"the teacher's logits of the {part} images are not available: {error}")
        return None


def _source(
    training_path: Path | str,
    classes: ClassMapConfig,
    context: StageContext,
    part: Part,
    features: Sequence[FeatureSpec] = (),
) -> JoinedStore:
    path = local_store_path(part_store_path(training_path, part), context.monitor)
    store = open_with_views(path, test_context(context).view_identity(), {})
    teacher = read_store_manifest(local_store_path(training_path, context.monitor)).identity.teacher
    if store.manifest.identity.teacher != teacher:
        raise StoreError(
            f"{path} is of another teacher than {training_path}: delete it and run `kdpipe cache-teacher`."
        )
    return join(store, context.test_set, features, "hard-labels", classes)


def _targets(sources: Sequence[JoinedStore]) -> Targets:
    return Targets(sources, torch.device("cpu"), TEST_LOADING)


def _accuracies(sources: Sequence[JoinedStore], context: StageContext) -> list[float]:
    """Return the accuracy of each teacher on the test images that it has targets for."""
    targets, labels = _targets(sources), context.test_set.labels
    correct: list[list[Tensor]] = [[] for _ in sources]
    for positions in torch.split(torch.arange(len(labels)), BATCH_SIZE):
        batch = zip(correct, targets.batch(0, positions), targets.target_masks(positions), strict=True)
        for found, outputs, mask in batch:
            is_correct = outputs.logits_at(1.0).argmax(1) == labels[positions]
            counts = labels[positions] != UNLABELED
            found.append(is_correct[counts if mask is None else counts & mask])
    return [float(torch.cat(found).float().mean()) for found in correct]
