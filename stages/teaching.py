"""The teaching of a student: the stores it learns from, opened and checked, and the losses that read them."""

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
from stages.machine.versions import library_versions
from stages.schedules import Amount, Ramp, extremes
from stages.serving import arrays_read
from stages.setup import Setup, deciding
from stages.targets import ReadConfig, Targets, slab_window
from stages.teachers import TeachersConfig, check_teachers
from stages.views.config import ViewsConfig
from stages.watch import Event, Watch
from store import (
    StoreError,
    TargetStore,
    default_area,
    interpolation,
    made_with,
    open_store,
    read_store_manifest,
    stage,
)

if TYPE_CHECKING:
    from stages.train_student import StudentConfig


@dataclass(frozen=True)
class Teaching:
    """The stores of a run, the losses that learn from them, and what the recipe says about that.

    shapes: of what the losses hook in the student. accuracies: each teacher's share of right answers on the test
    images, where they decide its weight.
    """

    stores: Sequence[TargetStore]
    shapes: Mapping[str, Shape]
    losses: Sequence[Entry]
    hard_label_weight: Amount
    read: ReadConfig = field(default_factory=ReadConfig)
    missing: Missing = "error"
    teachers: TeachersConfig = field(default_factory=TeachersConfig)
    accuracies: Sequence[float] | None = None
    label_smoothing: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """What decides the teaching's numbers."""
        record = {
            "stores": [store.manifest.numbers_sha256(names) for store, names in self._names()],
            "order": slab_window(self._names(), self.read),
            "losses": [_loss_json(loss) for loss in self.losses],
            "hard_label_weight": amount_json(self.hard_label_weight),
            "missing": self.missing,
        }
        # What is as it was before there was a choice is not written: jobs of older versions stay what they are.
        if self.teachers != TeachersConfig():
            record["teachers"] = asdict(self.teachers)
        if self.accuracies is not None:
            record["accuracies"] = list(self.accuracies)
        if self.label_smoothing:
            record["label_smoothing"] = self.label_smoothing
        return record

    @property
    def wanted(self) -> list[list[Wanted]]:
        """What is wanted of each store."""
        return [wanted_of(self.losses, self.shapes, number) for number in range(len(self.stores))]

    def of(self, losses: Sequence[Entry]) -> Teaching:
        """The same with these losses alone."""
        return replace(self, losses=tuple(losses))

    @property
    def main(self) -> Teaching:
        """The teaching of the student's own training: without the stages that come before it."""
        return self.of([loss for loss in self.losses if not isinstance(loss, FitNetConfig)])

    def sources(self, setup: Setup) -> list[Source]:
        """The stores, joined to the training samples. Raises what `join` raises."""
        return [
            join(store, setup.train_set, wanted, self.missing, self.teachers.class_map(number))
            for number, (store, wanted) in enumerate(zip(self.stores, self.wanted, strict=True))
        ]

    def _names(self) -> list[tuple[TargetStore, list[str]]]:
        """Each store with the arrays that are read of it."""
        return [(store, arrays_read(store, wanted)) for store, wanted in zip(self.stores, self.wanted, strict=True)]


def _loss_json(loss: Entry) -> dict[str, Any]:
    """What decides a loss, without the common keys that are as they are by default."""
    defaults = {"store": None, "samples": asdict(Selection()), "standardise": False}
    record = {key: value for key, value in deciding(loss).items() if key not in defaults or value != defaults[key]}
    # Hints had a store from the beginning: jobs of older versions stay what they are.
    return record | {"store": loss.store or 0} if loss.loss == "hint" else record


def amount_json(amount: Amount) -> Any:
    """A number or a ramp, as JSON."""
    return asdict(amount) if isinstance(amount, Ramp) else amount


def shapes_of(source: Source) -> TeacherShapes:
    """The shapes of what a store gives of a teacher's layers."""
    return {serving.wanted: serving.shape for serving in source.servings}


def check_losses(losses: Sequence[Entry], views: ViewsConfig, teachers: TeachersConfig, where: str = "distill") -> None:
    """Raise RecipeError for losses that cannot do what the recipe asks of them, whatever the stores hold."""
    if losses and views.mix is not None and teachers.weights == "confidence":
        raise RecipeError(
            "student.teachers.weights = 'confidence' goes by a sample's one true class, and [views.mix] gives two: "
            "leave out one of them."
        )
    for number, loss in enumerate(losses):
        entry = f"{where}.{number} ({loss.loss})"
        if loss.samples.weigh != "equal" and not loss.per_sample:
            raise RecipeError(
                f"{entry}: samples.weigh = {loss.samples.weigh!r} is for losses that are a mean over samples, and this "
                "one is about how samples go together: choose samples with samples.only instead."
            )
        if views.mix is not None and (loss.one_label or loss.samples.goes_by_label):
            what = entry if loss.one_label else f"{entry} with its samples chosen or weighed by their label"
            raise RecipeError(
                f"{what} needs the one true class of a sample, and [views.mix] gives two: leave out one of them."
            )


def open_stores(
    places: Sequence[Path | str],
    losses: Sequence[Entry],
    student: StudentConfig,
    identity: Mapping[str, Any],
    setup: Setup,
    *,
    shapes: Mapping[str, Shape],
) -> Teaching:
    """Open the stores that `losses` learn from. `identity` is what their manifests must say beside the views; `student`
    the recipe's section; shapes: of what the losses hook in the student.

    Stores at URLs, and archives, are staged first: copied to this machine and unpacked, once for all its jobs.

    Raises RecipeError where a loss names a store that is not there or asks for what no store can give, StoreError and
    FingerprintMismatch for stores that are incomplete or belong to another teacher, view recipe or number of views.
    """
    check_losses(losses, setup.views, student.teachers)
    check_teachers(student.teachers, len(places))
    for number, loss in enumerate(losses):
        if (loss.store or 0) >= len(places):
            raise RecipeError(
                f"distill.{number} ({loss.loss}) names store {loss.store}; there are {len(places)}, counted from 0."
            )
    paths = [on_this_machine(place, setup.watch) for place in places]
    stores = [open_for(setup, path, identity) for path in paths]
    fingerprints = [store.manifest.identity.fingerprint for store in stores]
    if len(set(fingerprints)) < len(fingerprints):
        raise RecipeError(
            f"student.stores names one teacher twice: {', '.join(map(str, places))} hold the same outputs."
        )
    for store in stores:
        _require_views(store, setup.views.num_views)
    _require_logits(stores, losses, student.teachers)
    teaching = Teaching(
        stores,
        shapes,
        tuple(losses),
        student.hard_label_weight,
        student.read,
        student.missing,
        student.teachers,
        label_smoothing=student.label_smoothing,
    )
    teaching.to_json()  # what a store lacks is told now
    return teaching


def check_together(teaching: Teaching, sources: Sequence[Source], targets: Targets) -> None:
    """Raise RecipeError for losses that make no sense with these stores together; StoreError for samples of which none
    of several teachers knows.
    """
    partial = [number for number, one in enumerate(sources) if one.class_map and not one.class_map.covers_all]
    together = [loss for loss in teaching.losses if loss.on_logits and loss.store is None]
    if partial and together and len(sources) > 1 and teaching.teachers.combine == "logits":
        raise RecipeError(
            f"the teacher of {sources[partial[0]].store.path} does not know all of the student's classes, and logits "
            "of other classes have no mean: set student.teachers.combine = 'probabilities'."
        )
    for number, loss in enumerate(teaching.losses):
        whole = loss.whole_logits or (isinstance(loss, Response) and loss.standardise)
        if whole and loss.on_logits and (partial if loss.store is None else loss.store in partial):
            raise RecipeError(
                f"distill.{number} ({loss.loss}) needs every class's logit, and a teacher that does not know all of "
                "the student's classes has none for some: use another loss, or a teacher of all (distill.store)."
            )
        softened = teaching.teachers.temperatures or (len(sources) > 1 and teaching.teachers.combine == "probabilities")
        if loss.whole_logits and loss.store is None and softened:
            raise RecipeError(
                f"distill.{number} ({loss.loss}) is about the logits themselves, and student.teachers makes something "
                "else of them (temperatures, or combine = 'probabilities'): give it one teacher with distill.store."
            )
        if loss.wanted_of_others and targets.residence == "streamed":
            raise RecipeError(
                f"distill.{number} ({loss.loss}) draws samples from the whole store at every step, and these targets "
                "are streamed: raise student.read.memory_bytes or mapped_bytes, or set memory = 'bank'."
            )
    if targets.num_unknown and teaching.missing == "error":
        raise StoreError(
            f"{targets.num_unknown} of the samples are in no store, or of classes that no teacher knows: leave them "
            "out of the data set (data.classes), or let them learn from their labels alone with student.missing = "
            "'hard-labels'."
        )


def open_for(setup: Setup, path: Path, identity: Mapping[str, Any]) -> TargetStore:
    """Open a store whose views are this setup's, with the advice that a user needs where they are not: the same recipe
    may be rendered otherwise here. `identity` is what else its manifest must say.
    """
    advice = "Cache again with this recipe into another run folder or store, or go back to the recipe that made it."
    advice += made_with(read_store_manifest(path).versions, library_versions())
    return open_store(path, {**identity, "views": setup.view_identity()}, advice)


def on_this_machine(place: Path | str, watch: Watch) -> Path:
    """Where the store at `place` can be mapped; staged, and said so, where it cannot be as it lies."""

    def on_unit(done: int, total: int) -> None:
        watch.report(Event("stage", f"{place} to {area.folder}", done, total, "unit"))

    area = default_area(os.environ)
    return stage(place, area, on_unit)


def _require_views(store: TargetStore, num_views: int) -> None:
    if store.num_views < num_views:
        raise RecipeError(
            f"{store.path} holds {store.num_views} views, the recipe wants {num_views}: run `kdpipe cache-teacher` "
            "with this recipe to add them, or lower views.num_views."
        )


def _require_probabilities(store: TargetStore, entry: str) -> None:
    """Raise RecipeError where a store with top-k logits does not know the teacher's probabilities as they are."""
    if store.manifest.top_k is None:
        return
    try:
        interpolation(store.manifest.top_k, 1.0)
    except StoreError as error:
        raise RecipeError(
            f"{entry} has its samples, or its teachers, judged by the teacher's probabilities at T = 1, which "
            f"{store.path} does not know ({error})"
        ) from error


def _require_logits(stores: Sequence[TargetStore], losses: Sequence[Entry], teachers: TeachersConfig) -> None:
    """Raise where a loss wants logits that a store with top-k logits cannot give: StoreError for a temperature at which
    it does not know the tail, RecipeError for more than a softmax.
    """
    for number, loss in enumerate(losses):
        for at, store in enumerate(stores):
            if not store.manifest.top_k or not loss.on_logits or loss.store not in (None, at):
                continue
            if loss.whole_logits or (isinstance(loss, Response) and loss.standardise):
                raise RecipeError(
                    f"distill.{number} ({loss.loss}) needs every class's logit, and {store.path} keeps the "
                    f"{store.manifest.top_k.k} largest: cache without cache.top_k into another store."
                )
            own = teachers.temperatures[at : at + 1] if loss.store is None else ()
            for temperature in own or loss.temperatures():
                for extreme in extremes(temperature):
                    interpolation(store.manifest.top_k, extreme)
        own_teacher = loss.store is not None or not loss.on_logits
        asked = [stores[loss.store or 0]] if own_teacher else list(stores)
        confident = teachers.weights == "confidence" and not own_teacher
        for store in asked if loss.samples.judges or confident else ():
            _require_probabilities(store, f"distill.{number} ({loss.loss})")
