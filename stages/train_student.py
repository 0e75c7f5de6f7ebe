"""Stage 2, `kdpipe train-student`: a student taught by hard labels alone, and the same one taught from stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from stages.config import Place, Seed, section, unequal
from stages.features import feature_shapes
from stages.job_folder import JobFolder
from stages.joining import Missing
from stages.lesson import Lesson
from stages.losses.entry import Entry
from stages.losses.fitnet import FitNetConfig
from stages.losses.said import Facts, Shapes
from stages.losses.simkd import SimKDConfig
from stages.losses.terms import build_distillation, student_layers
from stages.model_file import save_model
from stages.models.build import ModelConfig
from stages.network import Network, finish
from stages.optim import TrainConfig
from stages.order import derive_seed
from stages.reuse_classifier import require_teacher, with_teachers_classifier
from stages.schedules import Amount
from stages.setup import Setup, deciding, model_normalisation
from stages.targets import TargetLoadingConfig, Targets
from stages.teacher_on_test import test_accuracies
from stages.teachers import Combination, TeachersConfig
from stages.teaching import Teaching, check_together, open_stores, shapes_of
from stages.tensor_file import load_tensors
from stages.training import Job, train
from stages.views.config import ViewsConfig
from store import make_folders

ALONE, DISTILLED = "alone", "distilled"


@section
class StudentConfig:
    """The student, and how it is trained: once for each seed, alone and distilled, all else being equal.

    hard_label_weight: the weight of the cross entropy with the labels beside the distillation losses.
    label_smoothing: the share of each label that goes to all classes alike; of the student alone too.
    stores: the target stores to learn from; none means the one that this recipe's `cache-teacher` fills. Several are
    several teachers, as `teachers` says; a loss on features says which store it means.
    missing_targets: what samples are for which a store has no targets: an "error", or taught by their "hard-labels" alone.
    """

    model: ModelConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(unequal)] = (0, 1, 2)
    hard_label_weight: Amount = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    stores: tuple[Place, ...] = ()
    teachers: TeachersConfig = Field(default_factory=TeachersConfig)
    missing_targets: Missing = "error"
    target_loading: TargetLoadingConfig = Field(default_factory=TargetLoadingConfig)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


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


def student_shapes(config: StudentConfig, losses: Sequence[Entry], setup: Setup) -> Shapes:
    """The shapes of what `losses` hook in the student. Raises ModelError, listing the nearest, for a wrong path."""
    model = fresh_student(config, config.seeds[0], setup).model
    return feature_shapes(model, student_layers(losses), setup.image_shape)


def open_teaching(
    places: Sequence[Path | str],
    losses: Sequence[Entry],
    student: StudentConfig,
    identity: Mapping[str, Any],
    setup: Setup,
) -> Teaching:
    """The stores that `losses` teach the student from, opened and checked. Raises what `open_stores` raises."""
    shapes = student_shapes(student, losses, setup)
    teaching = open_stores(places, losses, student, identity, setup, shapes=shapes)
    if student.teachers.weights == "accuracy":
        teaching = replace(teaching, accuracies=test_accuracies(places, student.teachers, setup))
    for loss in losses:
        if isinstance(loss, SimKDConfig):
            store = teaching.stores[loss.store or 0]
            require_teacher(loss, setup.run, store.manifest.identity.teacher, store.path)
    return teaching


def build_lesson(
    network: Network,
    teaching: Teaching | None,
    seed: int,
    setup: Setup,
    *,
    label_smoothing: float = 0.0,
    settled: bool = False,
) -> Lesson:
    """What `network` is to learn from: hard labels alone where `teaching` is None, else also what the stores say.

    label_smoothing: of the student alone; a teaching has its own. settled: fine-tuning, for which ramps have ended.
    """
    views = setup.views
    lesson = Lesson(setup.pictures, views.num_views, network.normalise, fresh_views=not views.replay)
    if teaching is None:
        return replace(lesson, label_smoothing=label_smoothing)
    sources = teaching.sources(setup)
    distillation = build_distillation(
        teaching.losses,
        feature_shapes(network.model, student_layers(teaching.losses), setup.image_shape),
        [shapes_of(source) for source in sources],
        combination=Combination(teaching.teachers, len(sources), teaching.accuracies),
        facts=Facts(setup.train_set.num_samples, setup.train_set.num_classes),
        seed=derive_seed(seed, "adapters"),
    )
    targets = Targets(sources, setup.device, teaching.read)
    check_together(teaching, sources, targets)
    return replace(
        lesson,
        targets=targets,
        distillation=distillation,
        hard_label_weight=teaching.hard_label_weight,
        label_smoothing=teaching.label_smoothing,
        settled=settled,
    )


@dataclass(frozen=True)
class Seat:
    """Where a student is trained, under which name, and whether an ONNX file is made of it."""

    folder: JobFolder
    name: str
    with_onnx: bool = True


def train_student(
    config: StudentConfig, seed: int, teaching: Teaching | None, setup: Setup, *, seat: Seat | None = None
) -> dict[str, Any]:
    """Train one student, distilled by `teaching` or alone where that is None, and leave it in the run folder, or where
    `seat` says.

    Resumes where it was stopped; a finished one is not touched. Returns its figures.
    """
    if seat is None:
        kind = ALONE if teaching is None else DISTILLED
        seat = Seat(student_folder(setup.run, kind, seed), f"{kind} student, seed {seed}")
    setup.processes.require_shares(config.train.batch_size, setup.train_set.num_samples)
    folder = seat.folder
    network = fresh_student(config, seed, setup, teaching.losses if teaching else ())

    def begin() -> dict[str, Any] | None:
        folder.begin(_made_from(config, seed, teaching, network, setup))
        return folder.result()

    if (done := setup.processes.once(begin)) is not None:
        return done
    if teaching is not None:
        _hint_stages(config, seed, teaching, setup, network, seat=seat)
        teaching = teaching.main
    lesson = build_lesson(network, teaching, seed, setup, label_smoothing=config.label_smoothing)
    layers = student_layers(teaching.losses) if teaching else ()
    test = setup.test(network.normalise)
    job = Job(
        "train-student",
        seat.name,
        network.model,
        lesson,
        test,
        config.train,
        seed,
        folder,
        layers,
        processes=setup.processes,
    )
    return finish(folder, network, train(job, setup.device, setup.watch), setup, with_onnx=seat.with_onnx)


def _made_from(
    config: StudentConfig, seed: int, teaching: Teaching | None, network: Network, setup: Setup
) -> dict[str, Any]:
    """What decides a student."""
    return {
        "starts_from": network.identity,
        "train": deciding(config.train),
        "seed": seed,
        "data": setup.data_identity(),
        "test": setup.test_identity(),
        "views": setup.shown_views(),
        **({"label_smoothing": config.label_smoothing} if config.label_smoothing else {}),
        "teaching": teaching.to_json() if teaching else None,
    }


def _hint_stages(
    config: StudentConfig, seed: int, teaching: Teaching, setup: Setup, network: Network, *, seat: Seat
) -> None:
    """What comes before the student's own training where a loss is `fitnet`: each hint alone, one after the other, with
    only the modules up to the hint layer, at a constant learning rate. Each ends in a file, from which the next begins.
    """
    processes = setup.processes
    if processes.once(seat.folder.checkpoint.exists):
        return  # its own training is under way
    stages = [stage for loss in teaching.losses if isinstance(loss, FitNetConfig) for stage in loss.stages()]
    for number, stage in enumerate(stages, 1):
        own = JobFolder(seat.folder.path / f"hint{number}")
        if not processes.once(partial(_has_model, own)):
            lesson = build_lesson(network, teaching.of([stage]), derive_seed(seed, "hint", number), setup)
            job = Job(
                "train-student",
                f"{seat.name}, hint {number} of {len(stages)}",
                network.model,
                replace(lesson, hints_only=True),
                None,
                replace(config.train, epochs=stage.stage_epochs, schedule="step", milestones=()),
                seed,
                own,
                stage.student_layers(),
                processes=processes,
            )
            train(job, setup.device, setup.watch)
            record = {"architecture": dict(network.architecture)}
            processes.once(partial(save_model, own.model, network.model, record))
        if processes.first:
            own.checkpoint.unlink(missing_ok=True)
        network.model.load_state_dict(load_tensors(own.model)[0])


def _has_model(folder: JobFolder) -> bool:
    """Whether a job's network is there; its folder is in any case."""
    make_folders([folder.path])
    return folder.model.exists()


def fresh_student(config: StudentConfig, seed: int, setup: Setup, losses: Sequence[Entry] = ()) -> Network:
    """The untrained student of a seed, with what `losses` make part of it."""
    normalise = model_normalisation(setup.train_set, config.model.weights, config.mean, config.std)
    network = Network(setup.build(config.model, seed), setup.architecture(config.model), normalise)
    for loss in losses:
        if isinstance(loss, SimKDConfig):
            own = derive_seed(seed, "projector")
            network = with_teachers_classifier(network, loss, setup.run, setup.image_shape, own)
    return network
