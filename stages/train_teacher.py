"""Stage 0, `kdpipe train-teacher`: train a teacher, or use a trained one, for stage 1."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdpipe.stages.config import deciding, section
from kdpipe.stages.context import Setup, model_normalisation
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.bundle import Network
from kdpipe.stages.models.normalization import Normalisation
from kdpipe.stages.training.finalize import finish
from kdpipe.stages.training.job_dir import JobFolder, read_json
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.saved_model import load_finished
from kdpipe.stages.training.step import Job
from kdpipe.stages.training.task import Lesson
from kdpipe.store import FingerprintMismatch, differences


@section
class TeacherConfig:
    """Configuration of the teacher and its training. Without `train`, `model.weights` are used as they are."""

    model: ModelConfig
    train: TrainConfig | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def teacher_folder(run: Path) -> JobFolder:
    """Return the folder of a run's teacher."""
    return JobFolder(run / "teacher")


def train_teacher(config: TeacherConfig, seed: int, setup: Setup) -> dict[str, Any]:
    """Train a teacher, or load its weights, write it to the run folder with its ONNX file, and return its results.

    Training resumes where it was stopped; a finished teacher is not trained again. Raises RecipeError if the recipe has
    neither weights nor training, and the same as building and training.
    """
    if config.train is None and config.model.weights is None:
        raise RecipeError("the teacher has neither [teacher.train] nor teacher.model.weights: give one of them.")
    if config.train is not None:
        setup.processes.require_shares(config.train.batch_size, setup.train_set.num_samples)
    folder = teacher_folder(setup.run)
    teacher = _fresh(config, seed, setup)

    def begin() -> dict[str, Any] | None:
        folder.begin(
            {
                "starts_from": teacher.identity,
                "data": setup.data_identity(),
                "test": setup.test_identity(),
                "seed": seed,
                "train": deciding(config.train) if config.train else None,
                "views": setup.view_identity(),
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
    """Load the finished teacher of a run folder, in eval mode on the device; raises RunError if it is not finished.

    Without a mean in the recipe, its input scaling is that of its training, even if the data set has grown since.
    """
    folder = teacher_folder(setup.run)
    teacher = _fresh(config, seed, setup)
    record = load_finished(folder, teacher.model, teacher.architecture, "kdpipe train-teacher")
    teacher.model.eval().to(setup.device)
    return teacher if config.mean is not None else replace(teacher, normalise=Normalisation.from_json(record))


def require_same_training(config: TeacherConfig, seed: int, setup: Setup) -> None:
    """Raise FingerprintMismatch if the run folder's teacher has another seed or training configuration than the recipe.

    The store's record of its weights does not show that.
    """
    folder = teacher_folder(setup.run).path
    stored = read_json(folder / "job.json")
    if stored is None:
        return
    wanted = {"seed": seed, "train": deciding(config.train) if config.train else None}
    found = differences({key: stored.get(key) for key in wanted}, json.loads(json.dumps(wanted)))
    if found:
        advice = "Use the recipe that trained it, or give this one another run folder (--run)."
        raise FingerprintMismatch(f"the teacher in {folder}", found, advice)


def untrained_teacher(config: TeacherConfig, seed: int, setup: Setup) -> Network:
    """Build the teacher without training, in eval mode on the device, for its shapes and speed."""
    teacher = _fresh(config, seed, setup)
    teacher.model.eval().to(setup.device)
    return teacher


def teacher_identity(config: TeacherConfig, setup: Setup) -> dict[str, Any]:
    """Return the identity of the recipe's teacher without building it.

    `weights_sha256` comes from its results, and is left out if the run folder has none.
    """
    result = teacher_folder(setup.run).result()
    normalise = model_normalisation(setup.train_set, config.model.weights, config.mean, config.std)
    identity = {"architecture": setup.architecture(config.model), "normalization": normalise.to_json()}
    if result and config.mean is None:
        identity["normalization"] = result["identity"].get("normalization")
    return {**identity, "weights_sha256": result["identity"]["weights_sha256"]} if result else identity


def _fresh(config: TeacherConfig, seed: int, setup: Setup) -> Network:
    normalise = model_normalisation(setup.train_set, config.model.weights, config.mean, config.std)
    return Network(setup.build(config.model, seed), setup.architecture(config.model), normalise)
