"""Cache the teachers' logits of the test images in a store beside the training store, and evaluate them.

They are needed for the agreement of students with their teacher, and for teacher weights by accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.cache_teacher import cache_teacher
from stages.class_map import ClassMapConfig
from stages.errors import RecipeError
from stages.joining import Source, join
from stages.network import Network
from stages.part import WHOLE, Part
from stages.repair import repair
from stages.setup import Setup
from stages.store_plan import CacheConfig
from stages.targets import Targets
from stages.teachers import Combination, TeachersConfig
from stages.teaching import on_this_machine, open_for
from stages.views.config import ViewsConfig
from store import FingerprintMismatch, StoreError, is_url, read_store_manifest
from store.check.verify import VerifyReport


def test_place(place: Path | str) -> Path | str:
    """Return the path of the test store: `store.test.zarr` beside `store.zarr`."""
    folder, slash, name = str(place).rstrip("/").rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    beside = f"{folder}{slash}{stem}.test.{suffix}" if dot and stem else f"{folder}{slash}{name}.test"
    return beside if is_url(place) else Path(beside)


def test_setup(setup: Setup) -> Setup:
    """Return the context with the unaugmented test images in place of the training images and their views."""
    return replace(setup, train_set=setup.test_set, views=ViewsConfig(num_views=1), partners=None)


def cache_test(
    config: CacheConfig, path: Path, teacher: Network, setup: Setup, *, part: Part = WHOLE
) -> dict[str, Any]:
    """Cache the logits of the test images of `part` in the test store beside the store at `path`.

    Returns and raises like `cache_teacher`.
    """
    place = Path(test_place(path))
    return cache_teacher(replace(config, top_k=None), place, teacher, [], test_setup(setup), part=part)


def repair_test(config: CacheConfig, path: Path, teacher: Network, setup: Setup) -> tuple[VerifyReport, VerifyReport, int]:
    """Repair the test store at `path`. Returns and raises like `repair`."""
    return repair(replace(config, top_k=None), path, teacher, [], test_setup(setup))


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
    store = open_for(test_setup(setup), path, {})
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
