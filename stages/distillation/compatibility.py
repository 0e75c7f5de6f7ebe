"""Check that losses, views, teachers and stores go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kdpipe.stages.context import StageContext
from kdpipe.stages.data.image_set import ImageSet, require_classes
from kdpipe.stages.data.tasks import CLASSIFICATION, MULTILABEL, Task
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import LogitLoss, Loss
from kdpipe.stages.losses.features.fitnet import InitialLoss
from kdpipe.stages.losses.features.ft import FT
from kdpipe.stages.losses.schedules import Temperature, bounds
from kdpipe.stages.targets.ensemble import TeachersConfig
from kdpipe.stages.targets.join import JoinedStore
from kdpipe.stages.targets.outputs import NO_LOGITS
from kdpipe.stages.targets.reader import Targets
from kdpipe.stages.views.config import Views
from kdpipe.store import StoreError, TargetStore, TopK
from kdpipe.store.errors import did_you_mean
from kdpipe.store.format.encodings.logit_encoding import LogitEncoding
from kdpipe.store.format.encodings.sampled import Sampled


def check_losses(losses: Sequence[Loss], views: Views, teachers: TeachersConfig, where: str = "distill") -> None:
    """Raise RecipeError for losses that do not support the recipe's settings, whatever the stores contain."""
    if losses and views.mix is not None and teachers.weights == "confidence":
        raise RecipeError(
            "student.teachers.weights = 'confidence' needs a single label per sample, and [views.mix] gives two: "
            "remove one of them."
        )
    for number, loss in enumerate(losses):
        entry = f"{where}.{number} ({loss.loss})"
        _check_kinds(loss, views, entry)
        if loss.samples.weighting != "equal" and not loss.per_sample:
            raise RecipeError(
                f"{entry}: samples.weighting = {loss.samples.weighting!r} needs a per-sample loss, and this one "
                "compares samples with each other: select samples with samples.filter instead."
            )
        if teachers.temperatures and loss.store is None and len(loss.temperatures()) > 1:
            raise RecipeError(
                f"{entry} takes the teacher's probabilities at several temperatures, and student.teachers.temperatures "
                "replaces each of them: remove those, or select one teacher with distill.store."
            )
        if views.mix is not None and (loss.one_label or loss.samples.needs_single_label):
            what = entry if loss.one_label else f"{entry} with samples selected or weighted by their label"
            raise RecipeError(f"{what} needs a single label per sample, and [views.mix] gives two: remove one of them.")


def check_hard_label_views(student: StudentConfig, views: Views, where: str = "student") -> None:
    """Raise RecipeError for labels in kinds of views that there are not."""
    for kind in student.hard_label_views:
        _require_kind(kind, views, f"{where}.hard_label_views")


def _require_kind(kind: str, views: Views, key: str) -> None:
    if not views.kinds:
        raise RecipeError(f"{key} names the kind of view {kind!r}, and there are no kinds: set views.kinds.")
    if kind not in views.kinds:
        raise RecipeError(f"{key}: views.kinds has no kind {kind!r}; {did_you_mean(kind, views.kinds)}")


def _check_kinds(loss: Loss, views: Views, entry: str) -> None:
    """Raise RecipeError for a loss in kinds of views that there are not, or from which it cannot learn."""
    for key in ("view", "target_view"):
        if (kind := getattr(loss, key)) is not None:
            _require_kind(kind, views, f"{entry}: {key}")
    if views.kinds and loss.num_negatives and loss.view is None:
        raise RecipeError(
            f"{entry} contrasts samples in one kind of view: name it, as in view = {next(iter(views.kinds))!r}."
        )
    if loss.target == "student":
        _check_own_target(loss, entry)


def _check_own_target(loss: Loss, entry: str) -> None:
    """Raise RecipeError for a loss that cannot learn from the student's own outputs in another kind of view."""
    if loss.target_view is None:
        raise RecipeError(
            f"{entry}: target = 'student' needs target_view, the kind of view (views.kinds) in which its own outputs "
            "are the target."
        )
    if loss.view == loss.target_view:
        raise RecipeError(
            f"{entry}: target = 'student' compares the view {loss.view!r} with itself: name two different kinds."
        )
    if loss.store is not None:
        raise RecipeError(f"{entry}: target = 'student' learns from no store: leave out store = {loss.store}.")
    stages = isinstance(loss, InitialLoss | FT)
    if stages or loss.needs_head or loss.num_negatives or loss.input_gradient:
        needed = "stages of its own" if stages else "more of a teacher than logits and features"
        raise RecipeError(
            f"{entry} needs {needed}, and cannot have target = 'student': use a loss such as kd, logit_mse or hint."
        )


def class_warnings(losses: Sequence[Loss], num_classes: int) -> Iterator[str]:
    """Yield a warning for each loss of which a part is constant with so few classes."""
    for number, loss in enumerate(losses):
        if num_classes == 2 and loss.two_classes:
            yield f"distill.{number} ({loss.loss}): with two classes {loss.two_classes}; kd has no such part."


def check_image_size(
    losses: Sequence[Loss], student: StudentConfig, context: StageContext, where: str = "distill"
) -> None:
    """Raise RecipeError for losses that compare student and teacher pixel by pixel, if their images differ in size."""
    if context.resized(student.image_size).image_shape == context.renderer.shape:
        return
    for number, loss in enumerate(losses):
        if loss.input_gradient:
            raise RecipeError(
                f"{where}.{number} ({loss.loss}) compares gradients pixel by pixel, and student.image_size = "
                f"{student.image_size} gives the student other pixels than the teacher: remove one of them."
            )


def check_labels(losses: Sequence[Loss], teachers: TeachersConfig, train_set: ImageSet, where: str = "distill") -> None:
    """Raise RecipeError for what needs labels that the training images lack, or other outputs than these have."""
    _check_task(losses, teachers, train_set, where)
    if train_set.is_labeled:
        return
    num = f"{train_set.num_samples - len(train_set.labeled):,} of {train_set.num_samples:,} training images have none"
    for number, loss in enumerate(losses):
        entry = f"{where}.{number} ({loss.loss})"
        if loss.input_gradient:
            raise RecipeError(
                f"{entry} compares the gradients of the cross entropy with the labels, and {num}: use another loss."
            )
        if loss.needs_labels and not train_set.has_labels:
            by = "" if type(loss).one_label else " selects or weighs samples by their labels and"
            raise RecipeError(f"{entry}{by} needs labels, and the training images have none: use a loss such as kd.")
    if teachers.weights in ("confidence", "learnable") and not train_set.has_labels:
        raise RecipeError(
            f"student.teachers.weights = {teachers.weights!r} needs labels, and the training images have none: use "
            "'equal', or give the weights as numbers."
        )


def _check_task(losses: Sequence[Loss], teachers: TeachersConfig, train_set: ImageSet, where: str) -> None:
    """Raise RecipeError for losses that are not for these outputs, and what is for classes where there are none."""
    fitting: dict[Task, str] = {CLASSIFICATION: "kd", MULTILABEL: "binary_kd or logit_mse"}
    for number, loss in enumerate(losses):
        entry = f"{where}.{number} ({loss.loss})"
        if train_set.task not in loss.tasks:
            fits = f"is for {' and '.join(loss.tasks)}, and data.task is {train_set.task!r}"
            raise RecipeError(f"{entry} {fits}: use {fitting.get(train_set.task, 'logit_mse')}, or a loss on features.")
        if loss.samples.needs_probabilities:
            require_classes(train_set, f"{entry} with samples selected or weighted by probabilities")
        if vars(loss).get("standardize"):
            require_classes(train_set, f"{entry} with standardize")
    chosen = {"weights": isinstance(teachers.weights, str) and teachers.weights != "equal"}
    chosen |= {"temperatures": bool(teachers.temperatures), "classes": teachers.classes != TeachersConfig().classes}
    for key in (key for key, is_set in chosen.items() if is_set):
        value = getattr(teachers, key)
        require_classes(train_set, f"student.teachers.{key}" + f" = {value!r}" * isinstance(value, str))
    if teachers.ensemble == "probabilities":
        require_classes(train_set, "student.teachers.ensemble = 'probabilities'")


def temperatures_of(
    losses: Sequence[Loss], teachers: TeachersConfig, store: int, where: str = "distill"
) -> list[tuple[str, float]]:
    """Return the names and temperatures of the losses on the logits of a store; of schedules, the highest."""
    found = []
    for number, loss in enumerate(losses):
        if loss.reads_logits and loss.store in (None, store):
            own = teachers.temperatures[store : store + 1] if loss.store is None else ()
            highest = {bounds(temperature)[1] for temperature in own or loss.temperatures()}
            name = f"{where}.{number} ({loss.loss})"
            uneven = vars(loss).get("rest") == "student"
            found += [(name, temperature) for temperature in sorted(highest) if not uneven]
    return found


def check_combination(spec: DistillationSpec, sources: Sequence[JoinedStore], targets: Targets) -> None:
    """Check that the losses work with these stores together.

    Raises:
        RecipeError: A loss does not.
        StoreError: Samples have no targets in any store, and may not be missing.
    """
    maps = [source.class_map for source in sources]
    partial = [number for number, class_map in enumerate(maps) if class_map and not class_map.has_all_classes]
    together = [loss for loss in spec.losses if loss.reads_logits and loss.store is None]
    if partial and together and len(sources) > 1 and spec.teachers.ensemble == "logits":
        raise RecipeError(
            f"the teacher of {sources[partial[0]].store.path} lacks some of the student's classes, and logits of "
            "different classes cannot be averaged: set student.teachers.ensemble = 'probabilities'."
        )
    for number, loss in enumerate(spec.losses):
        if loss.target == "student":
            continue
        whole = loss.whole_logits or (isinstance(loss, LogitLoss) and loss.standardize)
        if whole and loss.on_logits and (partial if loss.store is None else loss.store in partial):
            raise RecipeError(
                f"distill.{number} ({loss.loss}) needs the logits of all classes, and a teacher lacks some of the "
                "student's classes: use another loss, or another teacher (distill.store)."
            )
        if vars(loss).get("rest") == "student" and any(maps):
            raise RecipeError(
                f"distill.{number} ({loss.loss}): rest = 'student' needs the student's classes in the store, and a "
                "teacher has others: leave it out."
            )
        softened = spec.teachers.temperatures or (len(sources) > 1 and spec.teachers.ensemble == "probabilities")
        if loss.whole_logits and loss.store is None and softened:
            raise RecipeError(
                f"distill.{number} ({loss.loss}) needs raw logits, which student.teachers does not keep (temperatures, "
                "or ensemble = 'probabilities'): select one teacher with distill.store."
            )
        if loss.compares_classes:
            _require_same_classes(spec, sources, number, loss)
        if loss.negative_features and targets.residence == "streamed":
            raise RecipeError(
                f"distill.{number} ({loss.loss}) reads samples from the whole store at every step, but the targets are "
                "streamed: raise student.target_loading.memory_bytes or mapped_bytes, or set memory = 'bank'."
            )
    if targets.num_without_targets and spec.missing_targets == "error":
        raise StoreError(
            f"{targets.num_without_targets} of the samples are in no store, or of classes that no teacher has: remove "
            "them from the data set (data.classes), or train on their labels alone with "
            "student.missing_targets = 'hard-labels'."
        )


def _require_same_classes(spec: DistillationSpec, sources: Sequence[JoinedStore], number: int, loss: Loss) -> None:
    """Raise RecipeError unless a loss that compares classes has one teacher, of the student's classes."""
    entry = f"distill.{number} ({loss.loss}) compares classes by what one teacher says of them, and"
    if loss.on_logits and loss.store is None and (len(sources) > 1 or spec.teachers.temperatures):
        raise RecipeError(f"{entry} student.teachers combines logits: select one teacher with distill.store.")
    if sources[loss.store or 0].class_map:
        raise RecipeError(f"{entry} its classes are not the student's: use another loss, or another teacher.")


def require_views(store: TargetStore, views: Views) -> None:
    if store.num_views < views.num_stored:
        needed = f"{views.num_stored}" + f", {views.num_views} of each kind" * bool(views.kinds)
        raise RecipeError(
            f"{store.path} has {store.num_views} views, the recipe needs {needed}: run `kdpipe cache-teacher` with "
            "this recipe to add them, or lower views.num_views."
        )


def _require_probabilities(store: TargetStore, entry: str) -> None:
    """Raise RecipeError if a store with encoded logits does not have the teacher's probabilities at T = 1."""
    encoding = store.manifest.encoding
    if encoding is None:
        return
    what = f"{entry} selects or weights samples or teachers by the teacher's probabilities at T = 1"
    if isinstance(encoding, Sampled):
        raise RecipeError(f"{what}, of which {store.path} has samples only: cache without cache.sampled_labels.")
    try:
        encoding.require_temperature(1.0)
    except StoreError as error:
        raise RecipeError(f"{what}, which {store.path} does not have ({error})") from error


def require_no_logits(losses: Sequence[Loss], store: int, where: str = "distill") -> None:
    """Raise RecipeError if a loss needs the logits of this store, which has the embeddings of its teacher."""
    for number, loss in enumerate(losses):
        is_own = (loss.store or 0) == store or (loss.store is None and loss.on_logits)
        reads_logits = loss.on_logits or loss.input_gradient or loss.samples.needs_probabilities
        if is_own and reads_logits and loss.target == "teacher":
            what = "selects samples by" if not loss.on_logits and not loss.input_gradient else "needs"
            raise RecipeError(f"{where}.{number} ({loss.loss}) {what} the teacher's logits: {NO_LOGITS}")


def require_logits(stores: Sequence[TargetStore], losses: Sequence[Loss], teachers: TeachersConfig) -> None:
    """Check that stores with encoded logits, or without any, have what the losses require.

    Raises:
        StoreError: A loss's temperature is outside the range of the stored tail.
        RecipeError: A loss needs the logits of all classes, or is not linear in sampled labels.
    """
    for index, store in enumerate(stores):
        if not store.manifest.has_logits:
            require_no_logits(losses, index)
    for number, loss in enumerate(losses):
        entry = f"distill.{number} ({loss.loss})"
        for index, store in enumerate(stores):
            if loss.reads_logits and loss.store in (None, index):
                own = teachers.temperatures[index : index + 1] if loss.store is None else ()
                encoding = store.manifest.encoding
                require_encoding(encoding, str(store.path), loss, own or loss.temperatures(), entry)
                averaged = loss.store is None and len(stores) > 1 and teachers.ensemble == "logits"
                if averaged and isinstance(encoding, Sampled):
                    raise RecipeError(
                        f"{entry} averages logits, and {store.path} has sampled labels: set "
                        "student.teachers.ensemble = 'probabilities'."
                    )
        own_teacher = loss.store is not None or not loss.on_logits
        used = [stores[loss.store or 0]] if own_teacher else list(stores)
        by_label = teachers.weights in ("confidence", "learnable") and len(stores) > 1 and not own_teacher
        reads_stores = loss.target == "teacher" and (loss.samples.needs_probabilities or by_label)
        for store in used if reads_stores else ():
            _require_probabilities(store, entry)


def require_fitting_encoding(
    encoding: LogitEncoding | None, losses: Sequence[Loss], teachers: TeachersConfig, where: str
) -> None:
    """Raise RecipeError, before a store is made, unless its encoding will serve the losses on logits."""
    for number, loss in enumerate(losses):
        if loss.reads_logits:
            own = teachers.temperatures[:1] if loss.store is None else ()
            entry = f"{where}.{number} ({loss.loss})"
            try:
                require_encoding(encoding, "the store", loss, own or loss.temperatures(), entry)
            except StoreError as error:
                raise RecipeError(f"{entry}: {error}") from error


def require_encoding(
    encoding: LogitEncoding | None, where: str, loss: Loss, temperatures: Sequence[Temperature], entry: str
) -> None:
    """Raise an error, as `require_logits`, unless an encoding serves a loss on logits at its temperatures."""
    if encoding is None or encoding.all_logits:
        return
    standardizes = isinstance(loss, LogitLoss) and loss.standardize
    if loss.whole_logits or standardizes:
        raise RecipeError(
            f"{entry} needs the logits of all classes, but {where} has {encoding.describe()}: cache without "
            f"cache.{'top_k' if isinstance(encoding, TopK) else 'sampled_labels'} into another store."
        )
    if isinstance(encoding, Sampled) and (not loss.linear or vars(loss).get("rest") == "student"):
        what = "rest = 'student'" if loss.linear else "it"
        raise RecipeError(
            f"{entry}: {what} is not linear in the teacher's probabilities, of which {where} has samples: use kd "
            "at T = 1, or cache without cache.sampled_labels into another store."
        )
    for temperature in temperatures:
        for value in bounds(temperature):
            encoding.require_temperature(value)
