"""Build and load teachers: what stage 0 (`kdpipe train-teacher`) trains and stage 1 runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from kdpipe.stages.config import PathStr, config_fingerprint, max_value, section
from kdpipe.stages.context import StageContext, model_normalization
from kdpipe.stages.data.image_set import require_classes
from kdpipe.stages.errors import ANOTHER_RUN, RecipeError
from kdpipe.stages.models.build import PUBLISHED, ModelConfig, weights_path
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.libraries.by_name import prefix_of, scaling_of_network, scaling_of_weights
from kdpipe.stages.models.normalization import Normalization, stated_scalings
from kdpipe.stages.models.user_models import is_user_model
from kdpipe.stages.models.weights.state_dict import weights_sha256
from kdpipe.stages.training.job_dir import JobDir, read_json_file
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.saved_model import load_finished
from kdpipe.stages.zero_shot import zero_shot
from kdpipe.store import FingerprintMismatch, differences


@section
class TeacherConfig:
    """Configuration of the teacher and its training.

    Without `train`, `model.weights` are used as they are, or those that a user's own network brings.

    Attributes:
        model: The network.
        train: Epochs, optimizer and schedule; none for a trained network.
        mean: The input's mean for each channel, of pixels in [0, 1]. Of a network that is trained here it is by default
            that of the training images; a trained one needs it, unless its weights state it.
        std: The input's standard deviation for each channel.
        expected_accuracy: The accuracy on the test images that the teacher is known to have, in percent. A lower one is
            refused, and given weights that reach it are not examined further.
        export: Whether to write an ONNX file where that is possible; by default of a teacher that is trained here. Only
            its latency in the report needs it.
        output: What it returns and the store keeps: "logits", or the "embeddings" of a trained network without a
            classifier, from which students learn by losses on features.
        class_embeddings: A .safetensors file with the embeddings of class names, [C, D], of a network like CLIP without
            its text tower: the logits are their cosines with the image's, times `logit_scale`. The names are a JSON
            list in its metadata (`names`), or in a file beside it (`.json`).
        logit_scale: That factor; CLIP's is 100.
    """

    model: ModelConfig
    train: TrainConfig | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    expected_accuracy: Annotated[float, Field(ge=0, le=100)] | None = None
    export: bool | None = None
    output: Literal["logits", "embeddings"] = "logits"
    class_embeddings: PathStr | None = None
    logit_scale: Annotated[float, Field(gt=0), max_value(10_000)] = 100.0

    def __post_init__(self) -> None:
        if not self.has_own_head:
            key = "output = 'embeddings'" if self.is_headless else "class_embeddings"
            if self.is_headless and self.class_embeddings is not None:
                raise ValueError("class_embeddings make logits of embeddings: leave out output, or class_embeddings")
            if self.train is not None or self.model.fresh_head or self.model.classes is not None:
                raise ValueError(
                    f"{key} is for a trained network without a classifier: leave out train, model.fresh_head and "
                    "model.classes"
                )
            if self.is_headless and self.export:
                raise ValueError("only networks that return logits are exported: leave out export")

    @property
    def has_own_head(self) -> bool:
        """Whether the network is built with a classifier."""
        return not self.is_headless and self.class_embeddings is None

    @property
    def is_headless(self) -> bool:
        """Whether the teacher returns embeddings in place of logits."""
        return self.output == "embeddings"

    @property
    def exports(self) -> bool:
        """Whether to write an ONNX file where that is possible."""
        return self.train is not None if self.export is None else self.export


def teacher_folder(run: Path) -> JobDir:
    """Return the folder of a run's teacher."""
    return JobDir(run / "teacher")


def teacher_fingerprint(
    config: TeacherConfig, seed: int, teacher: ModelBundle, context: StageContext
) -> dict[str, Any]:
    """Return everything that determines a teacher."""
    return {
        "starts_from": teacher.identity,
        "data": context.training_identity() if config.train or config.is_headless else context.data_identity(),
        "test": context.test_identity(),
        "seed": seed,
        "train": config_fingerprint(config.train) if config.train else None,
        "views": context.view_identity(),
    }


def load_teacher(config: TeacherConfig, seed: int, context: StageContext) -> ModelBundle:
    """Load the finished teacher of a run folder, in eval mode on the device; raises RunError if it is not finished.

    Without a mean in the recipe, its input scaling is that of its training, even if the data set has grown since.
    """
    folder = teacher_folder(context.run_dir)
    teacher = build_teacher(config, seed, context)
    record = load_finished(folder, teacher.model, teacher.architecture, "kdpipe train-teacher")
    teacher.model.eval().to(context.device)
    return teacher if config.mean is not None else replace(teacher, normalize=Normalization.from_json(record))


def require_weights(config: TeacherConfig, seed: int, context: StageContext) -> bool:
    """Return whether the teacher, a user's own network, brings its weights: they do not depend on the seed.

    Raises RecipeError if it has neither these nor other weights nor a training.
    """
    if config.train is not None or config.model.weights is not None:
        return False
    if not is_user_model(config.model.name):
        raise RecipeError("the teacher has neither [teacher.train] nor teacher.model.weights: give one of them.")
    one, other = (
        weights_sha256(context.build_model(config.model, each, headless=not config.has_own_head))
        for each in (seed, seed + 1)
    )
    if one != other:
        raise RecipeError(
            f"the teacher {config.model.name} has random weights, others for each seed: give teacher.model.weights or "
            "[teacher.train], or let the function load its weights."
        )
    return True


def require_same_training(config: TeacherConfig, seed: int, context: StageContext) -> None:
    """Raise FingerprintMismatch if the run folder's teacher has another seed or training configuration than the recipe.

    The store's record of its weights does not show that.
    """
    folder = teacher_folder(context.run_dir).path
    stored = read_json_file(folder / "job.json")
    if stored is None:
        return
    wanted = {"seed": seed, "train": config_fingerprint(config.train) if config.train else None}
    found = differences({key: stored.get(key) for key in wanted}, json.loads(json.dumps(wanted)))
    if found:
        advice = f"Use the recipe that trained it, or {ANOTHER_RUN}."
        raise FingerprintMismatch(f"the teacher in {folder}", found, advice)


def untrained_teacher(config: TeacherConfig, seed: int, context: StageContext) -> ModelBundle:
    """Build the teacher without training, in eval mode on the device, for its shapes and speed."""
    teacher = build_teacher(config, seed, context)
    teacher.model.eval().to(context.device)
    return teacher


def teacher_identity(config: TeacherConfig, context: StageContext) -> dict[str, Any]:
    """Return the identity of the recipe's teacher without building it.

    `weights_sha256` comes from its results, and is left out if the run folder has none.
    """
    result = teacher_folder(context.run_dir).result()
    normalize = model_normalization(context.train_set, config.model, config.mean, config.std)
    identity = {"architecture": _architecture(config, context), "normalization": normalize.to_json()}
    if result and config.mean is None:
        identity["normalization"] = result["identity"].get("normalization")
    return {**identity, "weights_sha256": result["identity"]["weights_sha256"]} if result else identity


def build_teacher(config: TeacherConfig, seed: int, context: StageContext) -> ModelBundle:
    """Build the untrained teacher, or the one with the weights that are taken as they are."""
    chooses = {"output = 'embeddings'": config.is_headless, "class_embeddings": config.class_embeddings is not None}
    chooses["model.classes"] = config.model.classes is not None
    for key in (key for key, is_set in chooses.items() if is_set):
        require_classes(context.train_set, f"teacher.{key}")
    model = context.build_model(config.model, seed, headless=not config.has_own_head)
    normalize = model_normalization(context.train_set, config.model, config.mean, config.std)
    if config.train is None and config.mean is None:
        normalize = next(iter(stated_by_weights(config.model, model, context).values()), normalize)
    if config.class_embeddings is not None:
        names = context.train_set.class_names
        model = zero_shot(model, config.class_embeddings, config.logit_scale, names, context.image_shape)
    return ModelBundle(model, _architecture(config, context), normalize)


def _architecture(config: TeacherConfig, context: StageContext) -> dict[str, Any]:
    """Return the record of the teacher's network."""
    record = context.architecture(config.model, headless=not config.has_own_head)
    if config.class_embeddings is None:
        return record
    return {**record, "num_classes": context.train_set.num_classes, "zero_shot": {"scale": config.logit_scale}}


def stated_by_weights(config: ModelConfig, model: nn.Module, context: StageContext) -> dict[str, Normalization]:
    """Return the input scalings that the teacher and its weights come with, by the place where each is stated."""
    weights = config.weights
    channels = context.train_set.in_channels
    if weights == PUBLISHED or prefix_of(config.name):
        by_name = scaling_of_weights(config.name, channels)
    else:
        by_name = scaling_of_network(model, channels)
    file = weights_path(weights) if weights and weights != PUBLISHED else None
    return by_name if weights == PUBLISHED else by_name | stated_scalings(model, file, channels)
