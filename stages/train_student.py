"""Stage 2, `kdpipe train-student`: a student taught by hard labels alone, and the same one taught from stores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from stages.config import section
from stages.errors import RecipeError
from stages.features import feature_shapes
from stages.job_folder import JobFolder
from stages.lesson import Lesson
from stages.losses.hint import HintConfig
from stages.losses.kd import KDConfig
from stages.losses.terms import LossConfig, build_terms, student_layers, teacher_layers
from stages.models.build import ModelConfig
from stages.network import Network, finish
from stages.optim import TrainConfig
from stages.order import derive_seed
from stages.setup import Setup, deciding, model_normalisation
from stages.store_plan import library_versions
from stages.targets import Missing, ReadConfig, Source, Targets, feature_array, join, names_wanted, slab_window
from stages.training import Job, train
from stages.views.config import ViewsConfig
from stages.watch import Event, Watch
from store import TargetStore, default_area, interpolation, made_with, open_store, read_store_manifest, stage

ALONE, DISTILLED = "alone", "distilled"


def _unequal(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("each may stand there once")
    return values


@section
class StudentConfig:
    """The student, and how it is trained: once for each seed, alone and distilled, all else being equal.

    hard_label_weight: the weight of the cross entropy with the labels beside the distillation losses.
    stores: the target stores to learn from; none means the one that this recipe's `cache-teacher` fills. Several are
    several teachers: losses on logits take the mean of theirs, a hint says which store it means.
    missing: what samples are for which a store has no targets: an "error", or taught by their "hard-labels" alone.
    """

    model: ModelConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_unequal)] = (0, 1, 2)
    hard_label_weight: Annotated[float, Field(ge=0)] = 0.1
    stores: tuple[str, ...] = ()
    missing: Missing = "error"
    read: ReadConfig = Field(default_factory=ReadConfig)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Teaching:
    """The stores of a run, opened and checked, with the losses that read them."""

    stores: Sequence[TargetStore]
    losses: Sequence[LossConfig]
    hard_label_weight: float
    read: ReadConfig = field(default_factory=ReadConfig)
    missing: Missing = "error"

    def to_json(self) -> dict[str, Any]:
        """What decides the teaching's numbers."""
        return {
            "stores": [store.manifest.numbers_sha256(names) for store, names in self._names()],
            "order": slab_window(self._names(), self.read),
            "losses": [deciding(loss) for loss in self.losses],
            "hard_label_weight": self.hard_label_weight,
            "missing": self.missing,
        }

    def _names(self) -> list[tuple[TargetStore, list[str]]]:
        """Each store with the arrays that the losses want of it."""
        return [
            (store, names_wanted(store, teacher_layers(self.losses, number)))
            for number, store in enumerate(self.stores)
        ]


def view_warning(views: ViewsConfig) -> str | None:
    """What to tell people whose student's labels will not go far: a sentence, or None."""
    if not views.augments or (views.replay and views.num_views > 1):
        return None
    what = (
        "views.replay = false: the student sees other pictures than those that its targets are about."
        if not views.replay
        else "views.num_views = 1: the student sees each image in one and the same view in every epoch."
    )
    return (
        f"{what} Against many consistent views, one fixed view cost a ResNet-50 on ImageNet-1k 1.2 points in 30 "
        "epochs, 2.3 in 300, 3.0 in 1,200 and 4.8 in 9,600 (Beyer et al. 2022); docs/views.md has figures for small "
        "students."
    )


def student_folder(run: Path, kind: str, seed: int) -> JobFolder:
    return JobFolder(run / "students" / f"{kind}-seed{seed}")


def open_teaching(
    places: Sequence[Path | str],
    losses: Sequence[LossConfig],
    student: StudentConfig,
    wanted: dict[str, Any],
    setup: Setup,
) -> Teaching:
    """Open the stores that `losses` learn from. `wanted` is what their manifests must say beside the views.

    Stores at URLs, and archives, are staged first: copied to this machine and unpacked, once for all its jobs.

    Raises RecipeError where a loss names a store that is not there, StoreError and FingerprintMismatch for stores that
    are incomplete or belong to another teacher, view recipe or number of views.
    """
    paths = [on_this_machine(place, setup.watch) for place in places]
    stores = [open_for(setup, path, wanted) for path in paths]
    fingerprints = [store.manifest.identity.fingerprint for store in stores]
    if len(set(fingerprints)) < len(fingerprints):
        raise RecipeError(
            f"student.stores names one teacher twice: {', '.join(map(str, places))} hold the same outputs."
        )
    for store in stores:
        if store.num_views < setup.views.num_views:
            raise RecipeError(
                f"{store.path} holds {store.num_views} views, the recipe wants {setup.views.num_views}: run `kdpipe "
                "cache-teacher` with this recipe to add them, or lower views.num_views."
            )
    for loss in losses:
        if isinstance(loss, HintConfig) and loss.store >= len(stores):
            raise RecipeError(f"a hint names store {loss.store}; there are {len(stores)}, counted from 0.")
    _require_temperatures(stores, losses)
    return Teaching(stores, losses, student.hard_label_weight, student.read, student.missing)


def open_for(setup: Setup, path: Path, wanted: dict[str, Any]) -> TargetStore:
    """Open a store whose views are this setup's, with the advice that a user needs where they are not: the same recipe
    may be rendered otherwise here. `wanted` names what else it must have.
    """
    advice = "Cache again with this recipe into another run folder or store, or go back to the recipe that made it."
    advice += made_with(read_store_manifest(path).versions, library_versions())
    return open_store(path, wanted | {"views": setup.view_identity()}, advice)


def on_this_machine(place: Path | str, watch: Watch) -> Path:
    """Where the store at `place` can be mapped; staged, and said so, where it cannot be as it lies."""

    def on_unit(done: int, total: int) -> None:
        watch.report(Event("stage", f"{place} to {area.folder}", done, total, "unit"))

    area = default_area(os.environ)
    return stage(place, area, on_unit)


def _require_temperatures(stores: Sequence[TargetStore], losses: Sequence[LossConfig]) -> None:
    """Raise StoreError where a loss has a temperature for which a store with top-k logits does not know the tail."""
    for store in stores:
        for loss in losses:
            if store.manifest.top_k and isinstance(loss, KDConfig):
                interpolation(store.manifest.top_k, loss.temperature)


def build_lesson(network: Network, teaching: Teaching | None, seed: int, setup: Setup) -> Lesson:
    """What `network` is to learn from: hard labels alone where `teaching` is None, else also what the stores say."""
    num_views, fresh = setup.views.num_views, not setup.views.replay
    if teaching is None:
        return Lesson(setup.pictures, num_views, network.normalise, fresh_views=fresh)
    sources = [
        join(store, setup.train_set, teacher_layers(teaching.losses, number), teaching.missing)
        for number, store in enumerate(teaching.stores)
    ]
    shapes = feature_shapes(network.model, student_layers(teaching.losses), setup.image_shape)
    terms = build_terms(
        teaching.losses, shapes, [_held_shapes(source) for source in sources], derive_seed(seed, "adapters")
    )
    targets = Targets(sources, setup.device, teaching.read)
    return Lesson(
        setup.pictures,
        num_views,
        network.normalise,
        targets=targets,
        fresh_views=fresh,
        terms=terms,
        hard_label_weight=teaching.hard_label_weight,
    )


def train_student(config: StudentConfig, seed: int, teaching: Teaching | None, setup: Setup) -> dict[str, Any]:
    """Train one student, distilled by `teaching` or alone where that is None, and leave it in the run folder.

    Resumes where it was stopped; a finished one is not touched. Returns its figures.
    """
    kind = ALONE if teaching is None else DISTILLED
    folder = student_folder(setup.run, kind, seed)
    network = fresh_student(config, seed, setup)
    folder.begin(
        {
            "starts_from": network.identity,
            "train": deciding(config.train),
            "seed": seed,
            "data": setup.data_identity(),
            "test": setup.test_identity(),
            "views": setup.shown_views(),
            "teaching": teaching.to_json() if teaching else None,
        }
    )
    if (done := folder.result()) is not None:
        return done
    lesson = build_lesson(network, teaching, seed, setup)
    layers = student_layers(teaching.losses) if teaching else ()
    name, test = f"{kind} student, seed {seed}", setup.test(network.normalise)
    job = Job("train-student", name, network.model, lesson, test, config.train, seed, folder, layers)
    return finish(folder, network, train(job, setup.device, setup.watch), setup)


def fresh_student(config: StudentConfig, seed: int, setup: Setup) -> Network:
    """The untrained student of a seed."""
    normalise = model_normalisation(setup.train_set, config.model.weights, config.mean, config.std)
    return Network(setup.build(config.model, seed), setup.architecture(config.model), normalise)


def _held_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    return {layer: source.store.spec(feature_array(layer)).row_shape for layer in source.layers}
