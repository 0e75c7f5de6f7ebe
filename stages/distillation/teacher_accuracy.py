"""Teacher logits and accuracies on the test images, from the test stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kdpipe.stages.context import Setup, test_setup
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.targets.class_map import ClassMapConfig
from kdpipe.stages.targets.ensemble import Combination, TeachersConfig
from kdpipe.stages.targets.join import Source, join
from kdpipe.stages.targets.open import on_this_machine, open_with_views, test_place
from kdpipe.stages.targets.reader import Targets
from kdpipe.store import FingerprintMismatch, StoreError, read_store_manifest


def teacher_logits(places: Sequence[Path | str], config: TeachersConfig, setup: Setup) -> Tensor | None:
    """Return the combined logits of the teachers for the test images, float32 [N, C], in the test set's order.

    Images without targets have rows of NaN.

    Args:
        places: Paths or URLs of the training stores.
        config: The `student.teachers` section.
        setup: The stage context.

    Returns:
        The logits; None if a store has no finished test store beside it.
    """
    sources = _sources(places, config, setup)
    if sources is None:
        return None
    # Learned weights belong to one student, and confidence weights need labels, which a test must not use.
    own = replace(config, weights="equal") if config.weights in ("learnable", "confidence") else config
    accuracies = _accuracies(sources, setup) if config.weights == "accuracy" else None
    indices, labels = torch.arange(setup.test_set.num_samples), setup.test_set.labels
    targets = Targets(sources, torch.device("cpu"))
    known = targets.known(indices)
    combined = Combination(own, len(sources), accuracies)(targets.batch(0, indices), known, labels)
    logits: Tensor = combined.logits_at(1.0).float()
    masks = [mask for mask in known if mask is not None]
    if len(masks) == len(known):
        logits[~torch.stack(masks).any(0)] = float("nan")
    return logits


def test_accuracies(places: Sequence[Path | str], config: TeachersConfig, setup: Setup) -> list[float]:
    """Return each teacher's accuracy on the test images. Raises RecipeError if a test store is missing."""
    sources = _sources(places, config, setup)
    if sources is None:
        raise RecipeError(
            "student.teachers.weights = 'accuracy' needs each teacher's accuracy on these test images, but not every "
            "store has a test store (store.test.zarr) of them beside it: run `kdpipe cache-teacher` again where the "
            "stores were made, or give the weights as numbers."
        )
    return _accuracies(sources, setup)


def _sources(places: Sequence[Path | str], config: TeachersConfig, setup: Setup) -> list[Source] | None:
    """Return the test stores, joined to the test images; None, with a warning, if one is not available."""
    try:
        return [_source(place, config.class_map(number), setup) for number, place in enumerate(places)]
    except (StoreError, FingerprintMismatch) as error:
        setup.watch.warn("test", f"the teacher's logits of the test images are not available: {error}")
        return None


def _source(place: Path | str, classes: ClassMapConfig, setup: Setup) -> Source:
    path = on_this_machine(test_place(place), setup.watch)
    store = open_with_views(path, test_setup(setup).view_identity(), {})
    beside = read_store_manifest(on_this_machine(place, setup.watch)).identity.teacher
    if store.manifest.identity.teacher != beside:
        raise StoreError(f"{path} is of another teacher than {place}: delete it and run `kdpipe cache-teacher`.")
    return join(store, setup.test_set, (), "hard-labels", classes)


def _accuracies(sources: Sequence[Source], setup: Setup) -> list[float]:
    targets = Targets(sources, torch.device("cpu"))
    indices, labels = torch.arange(setup.test_set.num_samples), setup.test_set.labels
    accuracies = []
    for outputs, known in zip(targets.batch(0, indices), targets.known(indices), strict=True):
        correct = outputs.logits_at(1.0).argmax(1) == labels
        accuracies.append(float((correct if known is None else correct[known]).float().mean()))
    return accuracies
