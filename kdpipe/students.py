"""Stage 2 from Python: train students from stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdpipe import datasets, models
from kdpipe.pipeline import steps
from kdpipe.results import StudentResult
from kdpipe.runs import Work, write_run_recipe
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import (
    ALONE,
    DISTILLED,
    StudentConfig,
    student_folder,
    view_warning,
)
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.distillation.teacher_accuracy import teacher_logits
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.open import local_store_path, test_store_path
from kdpipe.stages.train_student.student import student_fingerprint
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.views.config import ViewsConfig
from kdpipe.stages.views.from_store import views_of_store
from kdpipe.store import TargetStore, is_url, open_store, read_store_manifest

Store = TargetStore | str | Path


@dataclass(frozen=True)
class StudentJob:
    """How a student is trained.

    Attributes:
        config: The `student` section of the recipe.
        seed: Its seed.
        losses: The distillation losses; none for a student on hard labels alone.
        places: The paths or URLs of the stores.
        train_set: The training images.
        test_set: The test images.
        views: The views of the training images.
        run: The run folder.
    """

    config: StudentConfig
    seed: int
    losses: tuple[Loss, ...]
    places: tuple[Path | str, ...]
    train_set: ImageSet
    test_set: ImageSet
    views: ViewsConfig
    run: Path

    @property
    def kind(self) -> str:
        return DISTILLED if self.losses else ALONE

    def context(self, work: Work) -> StageContext:
        """Return the context, without its run folder, in which the teachers' logits of the test images are read."""
        local = [local_store_path(place, RunMonitor()) for place in self.places[:1]]
        context = work.context(self.train_set, self.test_set, self.views, store=next(iter(local), None))
        beside = [test_store_path(place) for place in self.places]
        if not beside or not all(is_url(place) or Path(place).exists() for place in beside):
            return context
        return replace(context, get_teacher_logits=lambda: teacher_logits(self.places, self.config.teachers, context))

    def open_stores(self, context: StageContext) -> DistillationSpec | None:
        """Open and check the stores; None for a student on hard labels alone."""
        if not self.losses:
            return None
        return open_distillation(self.places, self.losses, self.config, {}, context)

    def load(self, folder: Path) -> ModelBundle:
        """Load the trained network of a folder, in eval mode on the CPU."""
        context = Work(device="cpu", progress=False).context(self.train_set, self.test_set, self.views)
        bundle = build_student(self.config, self.seed, replace(context, run_dir=self.run), self.losses)
        bundle.model.load_state_dict(load_tensors(folder / "model.safetensors")[0])
        bundle.model.eval()
        return bundle

    def sections(self) -> dict[str, Any]:
        """Return the sections of the recipe that trains it, as far as they are known here."""
        teacher: dict[str, Any] = {"model": {"name": "none"}}
        if self.places and not is_url(self.places[0]):
            stored = read_store_manifest(Path(self.places[0])).identity.teacher
            architecture = stored["architecture"]
            teacher = {"model": {"name": architecture["model"], "args": architecture["args"]}}
            teacher |= stored["normalization"]
        model = self.config.model
        student = replace(self.config, model=ModelConfig(name=model.name, args=model.args, weights=model.weights))
        return {
            "data": {"name": self.train_set.name},
            "views": asdict(self.views),
            "teacher": teacher,
            "student": asdict(student),
            "distill": [asdict(loss) for loss in self.losses],
        }


def train_student(
    model: str | nn.Module,
    dataset: Any,
    store: Store | Sequence[Store] | None = None,
    *,
    test: Any,
    losses: Sequence[Loss] = (),
    hard_label_weight: Scheduled = 0.1,
    model_args: Mapping[str, Any] | None = None,
    views: ViewsConfig | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    device: str | torch.device = "auto",
    num_workers: int | None = None,
    progress: bool = True,
    **train: Any,
) -> StudentResult:
    """Train a student from stores, on the very views that the teacher saw; or on hard labels alone.

    A training that was stopped resumes in its folder; of a finished one the results are returned.

    Args:
        model: The name of a network, or a network object, of which a copy is trained.
        dataset: The training images, those of the stores: samples are joined by id.
        store: An opened store, a path or URL, or several of them (several teachers). Without one the student is
            trained on hard labels alone.
        test: The test images, on which it is evaluated after each epoch.
        losses: The distillation losses, of `kdpipe.losses`; by default KD.
        hard_label_weight: The weight of the cross entropy with the labels beside them.
        model_args: Arguments of a network given by name, such as {"width": 6}.
        views: Views for a student without a store; with one they are the store's.
        seed: Decides initial weights of a network given by name, order of the samples, and dropout.
        options: Further keys of a recipe's `student` section: `label_smoothing`, `missing_targets`, `mean`, `teachers`,
            `target_loading`, ...
        run: The run folder; by default one in `runs/`, named after a digest of all inputs.
        device: auto, cpu, cuda, cuda:N, or a torch.device.
        num_workers: Processes that decode images that are not in memory.
        progress: Whether to print progress to stderr.
        **train: Keys of a recipe's `train` section: `epochs`, `batch_size`, `lr`, `optimizer`, `schedule`, ...

    Raises:
        FingerprintMismatch: A store, or the folder, belongs to other inputs.
        KdpipeError: An input does not fit.
    """
    work = Work(run, device, num_workers, progress)
    places = store_places(store)
    if losses and not places:
        raise RecipeError("losses need a store: give that of cache_teacher, or leave the losses out.")
    if places and views is not None:
        raise RecipeError("a student sees the views of its store: leave out views=, which is for students without one.")
    config = StudentConfig(
        model=models.model_config(model, model_args),
        train=TrainConfig(**train),
        seeds=(seed,),
        hard_label_weight=hard_label_weight,
        stores=tuple(map(str, places)),
        **(options or {}),
    )
    job = StudentJob(
        config=config,
        seed=seed,
        losses=tuple(losses) or ((KD(),) if places else ()),
        places=places,
        train_set=datasets.as_image_set(dataset, "train"),
        test_set=datasets.as_image_set(test, "test"),
        views=_views(places, views),
        run=Path(),
    )
    context = job.context(work)
    if run is not None:
        context = replace(context, run_dir=work.folder("student", {}))  # where a loss may look for the teacher
    spec = job.open_stores(context)
    fingerprint = student_fingerprint(config, seed, spec, build_student(config, seed, context, job.losses), context)
    job = replace(job, run=work.folder("student", fingerprint))
    with work.open(job.run, context) as opened:
        if spec is not None and (warning := view_warning(job.views)):
            opened.monitor.warn("train-student", warning)
        figures = steps.train_student(config, seed, spec, opened)
        if opened.process_group.is_main:
            write_run_recipe(job.run, job.sections())
    return StudentResult(figures, student_folder(job.run, job.kind, seed).path, job)


def store_places(store: Store | Sequence[Store] | None) -> tuple[Path | str, ...]:
    """Return the absolute paths or URLs of the stores."""
    stores = [] if store is None else [store] if isinstance(store, TargetStore | str | Path) else list(store)
    named = [one.path if isinstance(one, TargetStore) else one for one in stores]
    return tuple(one if is_url(one) else Path(one).expanduser().absolute() for one in named)


def _views(places: Sequence[Path | str], views: ViewsConfig | None) -> ViewsConfig:
    if not places:
        return views or ViewsConfig()
    return views_of_store(open_store(local_store_path(places[0], RunMonitor())))
