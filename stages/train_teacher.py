"""Stage 0, `kdpipe train-teacher`: train a teacher, or take a trained one, and leave it where stage 1 finds it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.config import section
from stages.errors import RecipeError
from stages.job_folder import JobFolder, read_json
from stages.lesson import Lesson, Normalisation
from stages.model_file import load_finished
from stages.models.build import ModelConfig
from stages.network import Network, finish
from stages.optim import TrainConfig
from stages.setup import Setup, deciding, model_normalisation
from stages.training import Job, train
from store import FingerprintMismatch, differences


@section
class TeacherConfig:
    """The teacher: a network, and how to train it. Without `train`, `model.weights` are taken as they are."""

    model: ModelConfig
    train: TrainConfig | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def teacher_folder(run: Path) -> JobFolder:
    return JobFolder(run / "teacher")


def train_teacher(config: TeacherConfig, seed: int, setup: Setup) -> dict[str, Any]:
    """Leave a teacher in the run folder, with its ONNX file and figures; returns the figures.

    The training resumes where it was stopped, and a finished one is not touched. Raises RecipeError where the recipe
    gives neither weights nor training, and what building and training raise.
    """
    if config.train is None and config.model.weights is None:
        raise RecipeError("the teacher has neither [teacher.train] nor teacher.model.weights: give one of them.")
    if config.train is not None:
        setup.processes.require_shares(config.train.batch_size, setup.train_set.num_samples)
    folder = teacher_folder(setup.run)
    teacher = _fresh(config, seed, setup)

    def begin() -> dict[str, Any] | None:
        plan = {"train": deciding(config.train) if config.train else None, "views": setup.view_identity()}
        folder.begin(
            {
                "starts_from": teacher.identity,
                "data": setup.data_identity(),
                "test": setup.test_identity(),
                "seed": seed,
                **plan,
            }
        )
        return folder.result()

    if (done := setup.processes.once(begin)) is not None:
        return done
    history = []
    if config.train is not None:
        lesson = Lesson(setup.pictures, setup.views.num_views, teacher.normalise, fresh_views=True)
        test = setup.test(teacher.normalise)
        name, processes = "teacher", setup.processes
        job = Job("train-teacher", name, teacher.model, lesson, test, config.train, seed, folder, processes=processes)
        history = train(job, setup.device, setup.watch)
    return finish(folder, teacher, history, setup)


def load_teacher(config: TeacherConfig, seed: int, setup: Setup) -> Network:
    """The finished teacher of a run folder, in eval mode on the device. Raises RunError if it is not finished.

    Where the recipe does not say how it scales its input, that is as it was when it was trained, whatever samples have
    come to the data set since.
    """
    folder = teacher_folder(setup.run)
    teacher = _fresh(config, seed, setup)
    record = load_finished(folder, teacher.model, teacher.architecture, "kdpipe train-teacher")
    teacher.model.eval().to(setup.device)
    return teacher if config.mean is not None else replace(teacher, normalise=Normalisation.from_json(record))


def require_same_training(config: TeacherConfig, seed: int, setup: Setup) -> None:
    """Raise FingerprintMismatch where the teacher in the run folder comes of another seed, or was trained otherwise,
    than the recipe says: its weights alone do not tell.
    """
    folder = teacher_folder(setup.run).path
    stored = read_json(folder / "job.json")
    if stored is None:
        return
    wanted = {"seed": seed, "train": deciding(config.train) if config.train else None}
    found = differences({key: stored.get(key) for key in wanted}, json.loads(json.dumps(wanted)))
    if found:
        advice = "Go back to the recipe that made it, or give this one another run folder (--run)."
        raise FingerprintMismatch(f"the teacher in {folder}", found, advice)


def untrained_teacher(config: TeacherConfig, seed: int, setup: Setup) -> Network:
    """The teacher before its training, in eval mode on the device: its shapes and its speed are known already."""
    teacher = _fresh(config, seed, setup)
    teacher.model.eval().to(setup.device)
    return teacher


def teacher_identity(config: TeacherConfig, setup: Setup) -> dict[str, Any]:
    """What identifies the recipe's teacher, without building it: its architecture, its scaling, and, from its
    figures, its weights. Without figures in the run folder, `weights_sha256` is left out."""
    result = teacher_folder(setup.run).result()
    normalise = model_normalisation(setup.train_set, config.model.weights, config.mean, config.std)
    identity = {"architecture": setup.architecture(config.model), "normalization": normalise.to_json()}
    if result and config.mean is None:
        identity["normalization"] = result["identity"].get("normalization")
    return {**identity, "weights_sha256": result["identity"]["weights_sha256"]} if result else identity


def _fresh(config: TeacherConfig, seed: int, setup: Setup) -> Network:
    normalise = model_normalisation(setup.train_set, config.model.weights, config.mean, config.std)
    return Network(setup.build(config.model, seed), setup.architecture(config.model), normalise)
