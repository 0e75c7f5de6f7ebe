"""Teacher logits and accuracies on the test images, from the test stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kdpipe.stages.context import StageContext, test_context
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.targets.class_map import ClassMapConfig
from kdpipe.stages.targets.ensemble import TeacherEnsemble, TeachersConfig
from kdpipe.stages.targets.join import JoinedStore, join
from kdpipe.stages.targets.open import local_store_path, open_with_views, test_store_path
from kdpipe.stages.targets.outputs import TeacherTargets
from kdpipe.stages.targets.reader import Targets
from kdpipe.store import FingerprintMismatch, StoreError, read_store_manifest


def teacher_logits(stores: Sequence[Path | str], config: TeachersConfig, context: StageContext) -> Tensor | None:
    """Return the combined logits of the teachers for the test images, float32 [N, C], in the test set's order.

    Images without targets have rows of NaN.

    Args:
        stores: Paths or URLs of the training stores.
        config: The `student.teachers` section.
        context: The stage context.

    Returns:
        The logits; None if a store has no finished test store beside it.
    """
    sources = _sources(stores, config, context)
    if sources is None:
        return None
    # Learned weights belong to one student, and confidence weights need labels, which a test must not use.
    config = replace(config, weights="equal") if config.weights in ("learnable", "confidence") else config
    accuracies = _accuracies(sources, context) if config.weights == "accuracy" else None
    outputs, masks = _outputs(sources, context)
    ensemble = TeacherEnsemble(config, len(sources), accuracies)
    logits: Tensor = ensemble(outputs, masks, context.test_set.labels).logits_at(1.0).float()
    partial = [mask for mask in masks if mask is not None]
    if len(partial) == len(masks):
        logits[~torch.stack(partial).any(0)] = float("nan")
    return logits


def test_accuracies(stores: Sequence[Path | str], config: TeachersConfig, context: StageContext) -> list[float]:
    """Return each teacher's accuracy on the test images. Raises RecipeError if a test store is missing."""
    sources = _sources(stores, config, context)
    if sources is None:
        raise RecipeError(
            "student.teachers.weights = 'accuracy' needs each teacher's accuracy on these test images, but not every "
            "store has a test store (store.test.zarr) of them beside it: run `kdpipe cache-teacher` again where the "
            "stores were made, or give the weights as numbers."
        )
    return _accuracies(sources, context)


def _sources(stores: Sequence[Path | str], config: TeachersConfig, context: StageContext) -> list[JoinedStore] | None:
    """Return the test stores, joined to the test images; None, with a warning, if one is not available."""
    try:
        return [_source(path, config.class_map(number), context) for number, path in enumerate(stores)]
    except (StoreError, FingerprintMismatch) as error:
        context.monitor.warn("test", f"the teacher's logits of the test images are not available: {error}")
        return None


def _source(training_path: Path | str, classes: ClassMapConfig, context: StageContext) -> JoinedStore:
    path = local_store_path(test_store_path(training_path), context.monitor)
    store = open_with_views(path, test_context(context).view_identity(), {})
    teacher = read_store_manifest(local_store_path(training_path, context.monitor)).identity.teacher
    if store.manifest.identity.teacher != teacher:
        raise StoreError(
            f"{path} is of another teacher than {training_path}: delete it and run `kdpipe cache-teacher`."
        )
    return join(store, context.test_set, (), "hard-labels", classes)


def _outputs(sources: Sequence[JoinedStore], context: StageContext) -> tuple[list[TeacherTargets], list[Tensor | None]]:
    """Return each teacher's outputs for the test images, and which of the images it has targets for."""
    targets, indices = Targets(sources, torch.device("cpu")), torch.arange(context.test_set.num_samples)
    return targets.batch(0, indices), targets.target_masks(indices)


def _accuracies(sources: Sequence[JoinedStore], context: StageContext) -> list[float]:
    accuracies = []
    for outputs, mask in zip(*_outputs(sources, context), strict=True):
        correct = outputs.logits_at(1.0).argmax(1) == context.test_set.labels
        accuracies.append(float((correct if mask is None else correct[mask]).float().mean()))
    return accuracies
