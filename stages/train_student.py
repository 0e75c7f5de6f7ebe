"""Stage 2, `kdpipe train-student`: train students on hard labels alone, and distilled from stores."""

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
    """Configuration of the student and its training: once for each seed, alone and distilled, all else equal.

    Attributes:
        model: The network.
        train: Epochs, optimizer and schedule.
        seeds: The seeds; each gives a student alone and a distilled one.
        hard_label_weight: The weight of the cross entropy with the labels beside the distillation losses.
        label_smoothing: The share of each label that is spread over all classes; also for the student alone.
        stores: The target stores; by default the one that this recipe's `cache-teacher` fills. Several stores are
            several teachers, combined by `teachers`; a loss on features names its store.
        teachers: How several teachers are combined.
        missing: Samples without targets are an "error", or are trained on "hard-labels" only.
        read: How targets are loaded.
        mean: The input's mean for each channel; by default that of the training images.
        std: The input's standard deviation for each channel.
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
    """Return a warning for views that limit the accuracy of distillation, or None."""
    if not views.augments or (views.replay and views.num_views > 1):
        return None
    reason = (
        "views.replay = false: the student sees other views than those of its targets."
        if not views.replay
        else "views.num_views = 1: the student sees the same view of each image in every epoch."
    )
    return (
        f"{reason} Against many consistent views, one fixed view cost a ResNet-50 on ImageNet-1k 1.2 points in 30 "
        "epochs, 2.3 in 300, 3.0 in 1,200 and 4.8 in 9,600 (Beyer et al. 2022); docs/views.md has figures for small "
        "students."
    )


def student_folder(run: Path, kind: str, seed: int) -> JobFolder:
    """Return the folder of a student, ALONE or DISTILLED, of a run."""
    return JobFolder(run / "students" / f"{kind}-seed{seed}")


def student_shapes(config: StudentConfig, losses: Sequence[Entry], setup: Setup) -> Shapes:
    """Return the shapes of the student's features for `losses`; raises ModelError for unknown paths."""
    model = fresh_student(config, config.seeds[0], setup).model
    return feature_shapes(model, student_layers(losses), setup.image_shape)


def open_teaching(
    places: Sequence[Path | str],
    losses: Sequence[Entry],
    student: StudentConfig,
    identity: Mapping[str, Any],
    setup: Setup,
) -> Teaching:
    """Open and check the stores for `losses`. Raises the same as `open_stores`."""
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
    """Build the training task of `network`.

    Without `teaching` it has hard labels only, smoothed by `label_smoothing`. `seed` initializes the losses' adapters;
    `settled` means that all schedules have ended, as in fine-tuning.
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
class StudentRun:
    """The folder and name of a student's training, and whether to export an ONNX file."""

    folder: JobFolder
    name: str
    with_onnx: bool = True


def train_student(
    config: StudentConfig, seed: int, teaching: Teaching | None, setup: Setup, *, run: StudentRun | None = None
) -> dict[str, Any]:
    """Train one student, distilled by `teaching` or alone if that is None, and return its results.

    Training resumes where it was stopped; a finished student is not trained again. `run` defaults to a folder of
    setup.run.
    """
    if run is None:
        kind = ALONE if teaching is None else DISTILLED
        run = StudentRun(student_folder(setup.run, kind, seed), f"{kind} student, seed {seed}")
    setup.processes.require_shares(config.train.batch_size, setup.train_set.num_samples)
    folder = run.folder
    network = fresh_student(config, seed, setup, teaching.losses if teaching else ())

    def begin() -> dict[str, Any] | None:
        folder.begin(_made_from(config, seed, teaching, network, setup))
        return folder.result()

    if (done := setup.processes.once(begin)) is not None:
        return done
    if teaching is not None:
        _hint_stages(config, seed, teaching, setup, network, run=run)
        teaching = teaching.main
    lesson = build_lesson(network, teaching, seed, setup, label_smoothing=config.label_smoothing)
    layers = student_layers(teaching.losses) if teaching else ()
    test = setup.test(network.normalise)
    job = Job(
        "train-student",
        run.name,
        network.model,
        lesson,
        test,
        config.train,
        seed,
        folder,
        layers,
        processes=setup.processes,
    )
    return finish(folder, network, train(job, setup.device, setup.watch), setup, with_onnx=run.with_onnx)


def _made_from(
    config: StudentConfig, seed: int, teaching: Teaching | None, network: Network, setup: Setup
) -> dict[str, Any]:
    """Return the inputs that determine a student."""
    return {
        "starts_from": network.identity,
        "train": deciding(config.train),
        "seed": seed,
        "data": setup.data_identity(),
        "test": setup.test_identity(),
        "views": setup.shown_views(),
        "label_smoothing": config.label_smoothing,
        "teaching": teaching.to_json() if teaching else None,
    }


def _hint_stages(
    config: StudentConfig, seed: int, teaching: Teaching, setup: Setup, network: Network, *, run: StudentRun
) -> None:
    """Run the hint stages of `fitnet` losses, before the student's own training.

    Each hint is trained alone, with only the modules up to its layer, at a constant learning rate. Each stage writes a
    file from which the next one starts.
    """
    processes = setup.processes
    if processes.once(run.folder.checkpoint.exists):
        return  # the student's own training has begun
    stages = [stage for loss in teaching.losses if isinstance(loss, FitNetConfig) for stage in loss.stages()]
    for number, stage in enumerate(stages, 1):
        own = JobFolder(run.folder.path / f"hint{number}")
        if not processes.once(partial(_has_model, own)):
            lesson = build_lesson(network, teaching.of([stage]), derive_seed(seed, "hint", number), setup)
            job = Job(
                "train-student",
                f"{run.name}, hint {number} of {len(stages)}",
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
    """Create a job's folder and return whether its network exists."""
    make_folders([folder.path])
    return folder.model.exists()


def fresh_student(config: StudentConfig, seed: int, setup: Setup, losses: Sequence[Entry] = ()) -> Network:
    """Build the untrained student of a seed, with the modules that `losses` add to it."""
    normalise = model_normalisation(setup.train_set, config.model.weights, config.mean, config.std)
    network = Network(setup.build(config.model, seed), setup.architecture(config.model), normalise)
    for loss in losses:
        if isinstance(loss, SimKDConfig):
            own = derive_seed(seed, "projector")
            network = with_teachers_classifier(network, loss, setup.run, setup.image_shape, own)
    return network
