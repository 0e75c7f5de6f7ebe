"""Stage 2 from Python: train students from stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdpipe import datasets, models
from kdpipe.arguments import (
    LossLike,
    Scaling,
    as_list,
    as_losses,
    as_run_options,
    as_scaling,
    as_settings,
    as_views,
    shown,
)
from kdpipe.pipeline import steps
from kdpipe.results import StudentResult
from kdpipe.runs import CallbackLike, isolated, require_same_student, write_run_recipe
from kdpipe.stages.config import whole_number
from kdpipe.stages.distillation.student_config import (
    StudentConfig,
    student_folder,
    view_warning,
)
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.targets.ensemble import TeachersConfig
from kdpipe.stages.targets.open import local_store_path, trust_links
from kdpipe.stages.targets.reader import TargetLoadingConfig
from kdpipe.stages.train_student.student import student_fingerprint
from kdpipe.stages.training.heads import Heads
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.from_store import views_of_store
from kdpipe.store import TargetStore, is_url, open_store
from kdpipe.student_job import StudentJob

Store = TargetStore | str | Path

OPTIONS = {
    "model": "it as the first argument",
    "train": "its keys as arguments, such as epochs=",
    "seeds": "seed=, in one call for each seed",
    "hard_label_weight": "hard_label_weight=",
    "stores": "store, the third argument",
    "baseline": "no store, in a call of its own",
}
"""Keys of a recipe's `student` section that are arguments."""

TABLES = {"teachers": TeachersConfig, "target_loading": TargetLoadingConfig, "heads": Heads}
"""Its keys that a recipe writes as tables."""


@isolated
def train_student(
    model: str | nn.Module,
    dataset: Any,
    store: Store | Sequence[Store] | None = None,
    *,
    test: Any,
    validation: Any = None,
    losses: LossLike | Sequence[LossLike] | None = None,
    hard_label_weight: Scheduled = 0.1,
    model_args: Mapping[str, Any] | None = None,
    normalize: Scaling | None = None,
    views: Views | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    device: str | torch.device = "auto",
    num_workers: int | None = None,
    progress: bool = True,
    callbacks: CallbackLike | Sequence[CallbackLike] | None = None,
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
        validation: Images for that in place of the test images, which are then looked at once, at the end.
        losses: The distillation losses: of `kdpipe.losses`, your own, or names and entries as in a recipe, such as
            {"loss": "kd", "temperature": 2.0}; a list or a single one, by default KD.
        hard_label_weight: The weight of the cross entropy with the labels beside them.
        model_args: Arguments of a network given by name, such as {"width": 6}.
        normalize: The input scaling: (mean, std), each a number or one for each channel, for pixels in [0, 1], or that
            of another network; by default the statistics of the training images.
        views: Views for a student without a store; with one they are the store's.
        seed: Decides initial weights of a network given by name, order of the samples, and dropout.
        options: Further keys of a recipe's `student` section: `image_size`, `label_smoothing`, `export`,
            `missing_targets`, `teachers`, `target_loading`, `heads`, ...
        run: The run folder; by default one in `runs/`, named after a digest of all inputs.
        device: auto, cpu, cuda, cuda:N, or a torch.device.
        num_workers: Processes that decode images that are not in memory.
        progress: Whether to print progress to stderr.
        callbacks: What observes the trainings: `Callback` objects, or names such as "csv" and "wandb".
        **train: Keys of a recipe's `train` section: `epochs`, `batch_size`, `lr`, `optimizer`, `schedule`, ...

    Raises:
        FingerprintMismatch: A store, or the folder, belongs to other inputs.
        KdpipeError: An input does not fit.
    """
    run_options = as_run_options(run, device, num_workers, progress, callbacks)
    job = as_student_job(
        models.model_config(model, model_args),
        dataset,
        store,
        test=test,
        validation=validation,
        losses=losses,
        hard_label_weight=hard_label_weight,
        normalize=normalize,
        views=views,
        seed=seed,
        options=options,
        train=TrainConfig(**as_settings("train_student", train, {"seeds": OPTIONS["seeds"]})),
    )
    config, seed = job.config, job.seed
    context = job.context(run_options)
    spec = job.open_stores(context)
    fingerprint = student_fingerprint(config, seed, spec, build_student(config, seed, context, spec), context)
    job = replace(job, run=run_options.folder("student", fingerprint))
    require_same_student(job.run, job.sections())
    with run_options.open(job.run, context) as opened:
        if spec is not None and (warning := view_warning(job.views)):
            opened.monitor.warn("train-student", warning)
        figures = steps.train_student(config, seed, spec, opened)
        if opened.process_group.is_main:
            write_run_recipe(job.run, job.sections())
    return StudentResult(figures, student_folder(job.run, job.kind, seed).path, job)


def as_student_job(
    model: ModelConfig,
    dataset: Any,
    store: Store | Sequence[Store] | None,
    *,
    test: Any,
    validation: Any,
    losses: LossLike | Sequence[LossLike] | None,
    hard_label_weight: Scheduled,
    normalize: Scaling | None,
    views: Views | None,
    seed: int,
    options: Mapping[str, Any] | None,
    train: TrainConfig,
) -> StudentJob:
    """Return the job that arguments of `train_student`, or `train_cohort`, describe, without a run folder.

    Raises:
        KdpipeError: An argument does not fit.
    """
    seed, places, distill = whole_number("seed", seed), store_places(store), as_losses(losses)
    if distill and not places:
        raise RecipeError("losses need a store: give that of cache_teacher, or leave the losses out.")
    if places and views is not None:
        raise RecipeError("a student sees the views of its store: leave out views=, which is for students without one.")
    train_set = datasets.as_image_set(dataset)
    further = as_settings("options", options, OPTIONS)
    further |= {key: TABLES[key](**own) for key, own in further.items() if key in TABLES and isinstance(own, Mapping)}
    scaling = as_scaling(normalize, further.pop("mean", None), further.pop("std", None), train_set.in_channels)
    config = StudentConfig(
        model=model,
        train=train,
        seeds=(seed,),
        hard_label_weight=hard_label_weight,
        stores=tuple(map(str, places)),
        mean=scaling.mean if scaling else None,
        std=scaling.std if scaling else None,
        **further,
    )
    if config.target_loading.follow_links:
        trust_links(places)
    return StudentJob(
        config=config,
        seed=seed,
        losses=distill or ((KD(),) if places else ()),
        places=places,
        train_set=train_set,
        test_set=datasets.as_image_set(test, "test", like=train_set),
        views=views_of(places, views),
        run=Path(),
        validation_set=datasets.as_validation(validation, train_set),
    )


def store_places(store: Store | Sequence[Store] | None) -> tuple[Path | str, ...]:
    """Return the absolute paths or URLs of the stores."""
    stores = as_list(store)
    if store is not None and not stores:
        raise RecipeError("store is an empty list: give a store, or None to train on hard labels alone.")
    if wrong := [one for one in stores if not isinstance(one, TargetStore | str | Path)]:
        raise RecipeError(f"a store is a TargetStore, a path or a URL, not {shown(wrong[0])}.")
    named = [one.path if isinstance(one, TargetStore) else one for one in stores]
    return tuple(one if is_url(one) else Path(one).expanduser().absolute() for one in named)


def views_of(places: Sequence[Path | str], views: Views | None) -> Views:
    """Return the views of the first store, or without one those that are given."""
    if not places:
        return as_views(views)
    return views_of_store(open_store(local_store_path(places[0], RunMonitor())))
