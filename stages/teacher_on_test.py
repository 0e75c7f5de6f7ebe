"""What teachers say of the test images, in a store of its own beside the training store.

It tells whether teaching worked, and what each of several teachers is worth.
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
from store.verify import Verdict


def test_place(place: Path | str) -> Path | str:
    """Where what the teacher says of the test images lies: `store.test.zarr` beside `store.zarr`."""
    folder, slash, name = str(place).rstrip("/").rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    beside = f"{folder}{slash}{stem}.test.{suffix}" if dot and stem else f"{folder}{slash}{name}.test"
    return beside if is_url(place) else Path(beside)


def test_setup(setup: Setup) -> Setup:
    """The same with the test images, as they are, in the place of the training images in their views."""
    return replace(setup, train_set=setup.test_set, views=ViewsConfig(num_views=1), partners=None)


def cache_test(
    config: CacheConfig, path: Path, teacher: Network, setup: Setup, *, part: Part = WHOLE
) -> dict[str, Any]:
    """Fill `part` of the test store beside the store at `path`: the logits of every test image. Returns its figures,
    and raises what `cache_teacher` does.
    """
    place = Path(test_place(path))
    return cache_teacher(replace(config, top_k=None), place, teacher, [], test_setup(setup), part=part)


def repair_test(config: CacheConfig, path: Path, teacher: Network, setup: Setup) -> tuple[Verdict, Verdict, int]:
    """Put the test store at `path` right; returns and raises what `repair` does."""
    return repair(replace(config, top_k=None), path, teacher, [], test_setup(setup))


def teacher_logits(places: Sequence[Path | str], config: TeachersConfig, setup: Setup) -> Tensor | None:
    """What the teachers of the stores at `places` say together of the test images: float32 [N, C], in the test set's
    order, rows of NaN for images of which none knows; None where a store has no finished test store beside it.
    """
    sources = _sources(places, config, setup)
    if sources is None:
        return None
    # Learnt shares are a student's own; those by confidence go by labels, with which one does not answer a test.
    own = replace(config, weights="equal") if config.weights in ("learnable", "confidence") else config
    accuracies = _accuracies(sources, setup) if config.weights == "accuracy" else None
    at, labels = torch.arange(setup.test_set.num_samples), setup.test_set.labels
    targets = Targets(sources, torch.device("cpu"))
    known = targets.known(at)
    together = Combination(own, len(sources), accuracies)(targets.batch(0, at), known, labels)
    logits: Tensor = together.logits_at(1.0).float()
    masks = [mask for mask in known if mask is not None]
    if len(masks) == len(known):
        logits[~torch.stack(masks).any(0)] = float("nan")
    return logits


def test_accuracies(places: Sequence[Path | str], config: TeachersConfig, setup: Setup) -> list[float]:
    """Each teacher's share of right answers on the test images. Raises RecipeError where a test store is absent."""
    sources = _sources(places, config, setup)
    if sources is None:
        raise RecipeError(
            "student.teachers.weights = 'accuracy' needs to know how good each teacher is on these test images, and "
            "not every store has its test store (store.test.zarr) beside it, or one of the same images: run `kdpipe "
            "cache-teacher` again where the stores were made, or give the weights as numbers."
        )
    return _accuracies(sources, setup)


def _sources(places: Sequence[Path | str], config: TeachersConfig, setup: Setup) -> list[Source] | None:
    """The test stores, joined to the test images; None, and people are told why, where one is not to be had."""
    try:
        return [_source(place, config.class_map(number), setup) for number, place in enumerate(places)]
    except (StoreError, FingerprintMismatch) as error:
        setup.watch.warn("test", f"what the teacher says of the test images is not known: {error}")
        return None


def _source(place: Path | str, classes: ClassMapConfig, setup: Setup) -> Source:
    path = on_this_machine(test_place(place), setup.watch)
    store = open_for(test_setup(setup), path, {})
    beside = read_store_manifest(on_this_machine(place, setup.watch)).identity.teacher
    if store.manifest.identity.teacher != beside:
        raise StoreError(f"{path} is of another teacher than {place}: delete it, and run `kdpipe cache-teacher`.")
    return join(store, setup.test_set, (), "hard-labels", classes)


def _accuracies(sources: Sequence[Source], setup: Setup) -> list[float]:
    targets = Targets(sources, torch.device("cpu"))
    at, labels = torch.arange(setup.test_set.num_samples), setup.test_set.labels
    shares = []
    for said, known in zip(targets.batch(0, at), targets.known(at), strict=True):
        right = said.logits_at(1.0).argmax(1) == labels
        shares.append(float((right if known is None else right[known]).float().mean()))
    return shares
