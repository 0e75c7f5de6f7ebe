"""Open and check the stores that a student is distilled from, and the losses that read them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import RecipeError
from stages.forms import Shape, Wanted
from stages.joining import Missing, Source, join
from stages.losses.entry import Entry, Response
from stages.losses.fitnet import FitNetConfig
from stages.losses.said import TeacherShapes
from stages.losses.selection import Selection
from stages.losses.terms import wanted_of
from stages.schedules import Amount, Ramp, extremes
from stages.serving import arrays_read
from stages.setup import Setup, deciding
from stages.store_plan import library_versions
from stages.targets import TargetLoadingConfig, Targets, slab_window
from stages.teachers import TeachersConfig, check_teachers
from stages.views.config import ViewsConfig
from stages.watch import Event, Watch
from store import (
    StoreError,
    TargetStore,
    default_staging_cache,
    interpolation,
    open_store,
    read_store_manifest,
    stage,
    version_note,
)

if TYPE_CHECKING:
    from stages.train_student import StudentConfig


@dataclass(frozen=True)
class Teaching:
    """The stores and losses of a distillation, with their settings.

    Attributes:
        stores: The opened stores, one per teacher.
        shapes: The shapes of the student's features that the losses use.
        losses: The losses' configurations.
        accuracies: Each teacher's accuracy on the test images, if they decide its weight.
    """

    stores: Sequence[TargetStore]
    shapes: Mapping[str, Shape]
    losses: Sequence[Entry]
    hard_label_weight: Amount
    read: TargetLoadingConfig = field(default_factory=TargetLoadingConfig)
    missing: Missing = "error"
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    accuracies: Sequence[float] | None = None
    label_smoothing: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return everything that decides the results."""
        record = {
            "stores": [store.manifest.numbers_sha256(names) for store, names in self._names()],
            "order": slab_window(self._names(), self.read),
            "losses": [_loss_json(loss) for loss in self.losses],
            "hard_label_weight": amount_json(self.hard_label_weight),
            "missing": self.missing,
        }
        if self.teachers != TeachersConfig():
            record["teachers"] = asdict(self.teachers)
        if self.accuracies is not None:
            record["accuracies"] = list(self.accuracies)
        if self.label_smoothing:
            record["label_smoothing"] = self.label_smoothing
        return record

    @property
    def wanted(self) -> list[list[Wanted]]:
        """Return the features required of each store."""
        return [wanted_of(self.losses, self.shapes, number) for number in range(len(self.stores))]

    def of(self, losses: Sequence[Entry]) -> Teaching:
        """Return the same with these losses alone."""
        return replace(self, losses=tuple(losses))

    @property
    def main(self) -> Teaching:
        """Return the losses of the student's own training: without the FitNet stages before it."""
        return self.of([loss for loss in self.losses if not isinstance(loss, FitNetConfig)])

    def sources(self, setup: Setup) -> list[Source]:
        """Return the stores, joined to the training samples. Raises like `join`."""
        return [
            join(store, setup.train_set, wanted, self.missing, self.teachers.class_map(number))
            for number, (store, wanted) in enumerate(zip(self.stores, self.wanted, strict=True))
        ]

    def _names(self) -> list[tuple[TargetStore, list[str]]]:
        """Return each store with the arrays that are read of it."""
        return [(store, arrays_read(store, wanted)) for store, wanted in zip(self.stores, self.wanted, strict=True)]


def _loss_json(loss: Entry) -> dict[str, Any]:
    """Return what decides a loss, without common keys at their defaults."""
    defaults = {"store": None, "samples": asdict(Selection()), "standardize": False}
    record = {key: value for key, value in deciding(loss).items() if key not in defaults or value != defaults[key]}
    return record | {"store": loss.store or 0} if loss.loss == "hint" else record


def amount_json(amount: Amount) -> Any:
    """Return a number or a schedule as JSON."""
    return asdict(amount) if isinstance(amount, Ramp) else amount


def shapes_of(source: Source) -> TeacherShapes:
    """Return the shapes of the required features, as the store serves them."""
    return {feature.feature: feature.shape for feature in source.features}


def check_losses(losses: Sequence[Entry], views: ViewsConfig, teachers: TeachersConfig, where: str = "distill") -> None:
    """Raise RecipeError for losses that do not support the recipe's settings, whatever the stores contain."""
    if losses and views.mix is not None and teachers.weights == "confidence":
        raise RecipeError(
            "student.teachers.weights = 'confidence' needs a single label per sample, and [views.mix] gives two: "
            "remove one of them."
        )
    for number, loss in enumerate(losses):
        entry = f"{where}.{number} ({loss.loss})"
        if loss.samples.weighting != "equal" and not loss.per_sample:
            raise RecipeError(
                f"{entry}: samples.weighting = {loss.samples.weighting!r} needs a per-sample loss, and this one compares "
                "samples with each other: select samples with samples.filter instead."
            )
        if views.mix is not None and (loss.one_label or loss.samples.goes_by_label):
            what = entry if loss.one_label else f"{entry} with samples selected or weighted by their label"
            raise RecipeError(f"{what} needs a single label per sample, and [views.mix] gives two: remove one of them.")


def open_stores(
    places: Sequence[Path | str],
    losses: Sequence[Entry],
    student: StudentConfig,
    identity: Mapping[str, Any],
    setup: Setup,
    *,
    shapes: Mapping[str, Shape],
) -> Teaching:
    """Open and check the stores that `losses` learn from.

    Stores at URLs, and archives, are staged first: copied to this machine and unpacked, once for all its jobs.

    Args:
        places: Paths or URLs of the stores.
        losses: The losses' configurations.
        student: The recipe's `student` section.
        identity: What the stores' manifests must contain, besides the views.
        setup: The stage context.
        shapes: The shapes of the student's features that the losses use.

    Raises:
        RecipeError: A loss names a store that does not exist, or requires something that no store can provide.
        StoreError: A store is incomplete, or lacks something.
        FingerprintMismatch: A store belongs to another teacher or other views.
    """
    check_losses(losses, setup.views, student.teachers)
    check_teachers(student.teachers, len(places))
    for number, loss in enumerate(losses):
        if (loss.store or 0) >= len(places):
            raise RecipeError(
                f"distill.{number} ({loss.loss}) uses store {loss.store}, but there are {len(places)}, counted from 0."
            )
    paths = [on_this_machine(place, setup.watch) for place in places]
    stores = [open_for(setup, path, identity) for path in paths]
    fingerprints = [store.manifest.identity.fingerprint for store in stores]
    if len(set(fingerprints)) < len(fingerprints):
        raise RecipeError(
            f"student.stores has one teacher twice: {', '.join(map(str, places))} contain the same outputs."
        )
    for store in stores:
        _require_views(store, setup.views.num_views)
    _require_logits(stores, losses, student.teachers)
    teaching = Teaching(
        stores,
        shapes,
        tuple(losses),
        student.hard_label_weight,
        student.target_loading,
        student.missing_targets,
        student.teachers,
        label_smoothing=student.label_smoothing,
    )
    teaching.to_json()  # raises if a store lacks an array
    return teaching


def check_together(teaching: Teaching, sources: Sequence[Source], targets: Targets) -> None:
    """Check that the losses work with these stores together.

    Raises:
        RecipeError: A loss does not.
        StoreError: Samples have no targets in any store, and may not be missing.
    """
    maps = [source.class_map for source in sources]
    partial = [number for number, class_map in enumerate(maps) if class_map and not class_map.covers_all]
    together = [loss for loss in teaching.losses if loss.on_logits and loss.store is None]
    if partial and together and len(sources) > 1 and teaching.teachers.ensemble == "logits":
        raise RecipeError(
            f"the teacher of {sources[partial[0]].store.path} lacks some of the student's classes, and logits of "
            "different classes cannot be averaged: set student.teachers.ensemble = 'probabilities'."
        )
    for number, loss in enumerate(teaching.losses):
        whole = loss.whole_logits or (isinstance(loss, Response) and loss.standardize)
        if whole and loss.on_logits and (partial if loss.store is None else loss.store in partial):
            raise RecipeError(
                f"distill.{number} ({loss.loss}) needs the logits of all classes, and a teacher lacks some of the "
                "student's classes: use another loss, or another teacher (distill.store)."
            )
        softened = teaching.teachers.temperatures or (len(sources) > 1 and teaching.teachers.ensemble == "probabilities")
        if loss.whole_logits and loss.store is None and softened:
            raise RecipeError(
                f"distill.{number} ({loss.loss}) needs raw logits, which student.teachers does not keep (temperatures, "
                "or ensemble = 'probabilities'): select one teacher with distill.store."
            )
        if loss.wanted_of_others and targets.residence == "streamed":
            raise RecipeError(
                f"distill.{number} ({loss.loss}) reads samples from the whole store at every step, but the targets are "
                "streamed: raise student.target_loading.memory_bytes or mapped_bytes, or set memory = 'bank'."
            )
    if targets.num_unknown and teaching.missing == "error":
        raise StoreError(
            f"{targets.num_unknown} of the samples are in no store, or of classes that no teacher has: remove them "
            "from the data set (data.classes), or train on their labels alone with student.missing_targets = 'hard-labels'."
        )


def open_for(setup: Setup, path: Path, identity: Mapping[str, Any]) -> TargetStore:
    """Open a store that must have this setup's views; another library version may render them differently.

    Args:
        setup: The stage context.
        path: The store's folder.
        identity: What its manifest must contain, besides the views.
    """
    advice = "Cache with this recipe into another run folder or store, or return to the recipe that made it."
    advice += version_note(read_store_manifest(path).versions, library_versions())
    return open_store(path, {**identity, "views": setup.view_identity()}, advice)


def on_this_machine(place: Path | str, watch: Watch) -> Path:
    """Return a local path of a store that can be memory-mapped, staging it first if necessary."""

    def on_unit(done: int, total: int) -> None:
        watch.report(Event("stage", f"{place} to {area.folder}", done, total, "unit"))

    area = default_staging_cache(os.environ)
    return stage(place, area, on_unit)


def _require_views(store: TargetStore, num_views: int) -> None:
    if store.num_views < num_views:
        raise RecipeError(
            f"{store.path} has {store.num_views} views, the recipe needs {num_views}: run `kdpipe cache-teacher` with "
            "this recipe to add them, or lower views.num_views."
        )


def _require_probabilities(store: TargetStore, entry: str) -> None:
    """Raise RecipeError if a store with top-k logits does not have the teacher's probabilities at T = 1."""
    if store.manifest.top_k is None:
        return
    try:
        interpolation(store.manifest.top_k, 1.0)
    except StoreError as error:
        raise RecipeError(
            f"{entry} selects or weights samples or teachers by the teacher's probabilities at T = 1, which "
            f"{store.path} does not have ({error})"
        ) from error


def _require_logits(stores: Sequence[TargetStore], losses: Sequence[Entry], teachers: TeachersConfig) -> None:
    """Check that stores with top-k logits have what the losses require.

    Raises:
        StoreError: A loss's temperature is outside the range of the stored tail.
        RecipeError: A loss needs the logits of all classes.
    """
    for number, loss in enumerate(losses):
        for index, store in enumerate(stores):
            if not store.manifest.top_k or not loss.on_logits or loss.store not in (None, index):
                continue
            if loss.whole_logits or (isinstance(loss, Response) and loss.standardize):
                raise RecipeError(
                    f"distill.{number} ({loss.loss}) needs the logits of all classes, but {store.path} has only the "
                    f"{store.manifest.top_k.k} largest: cache without cache.top_k into another store."
                )
            own = teachers.temperatures[index : index + 1] if loss.store is None else ()
            for temperature in own or loss.temperatures():
                for value in extremes(temperature):
                    interpolation(store.manifest.top_k, value)
        own_teacher = loss.store is not None or not loss.on_logits
        used = [stores[loss.store or 0]] if own_teacher else list(stores)
        by_confidence = teachers.weights == "confidence" and not own_teacher
        for store in used if loss.samples.judges or by_confidence else ():
            _require_probabilities(store, f"distill.{number} ({loss.loss})")
