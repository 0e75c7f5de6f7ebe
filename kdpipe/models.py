"""Networks of the Python API: build them by name, load those that kdpipe has written."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from kdpipe.arguments import as_path, as_settings, shown
from kdpipe.datasets import as_image_set
from kdpipe.runs import isolated
from kdpipe.stages.compress.artifacts.load import rebuild
from kdpipe.stages.config import whole_number
from kdpipe.stages.context import VIEW_SIZE
from kdpipe.stages.errors import ModelError
from kdpipe.stages.given_teacher import has_new_head
from kdpipe.stages.models.build import OBJECT, GivenModel, ModelConfig
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.classes import build_for_classes
from kdpipe.stages.models.clone import unwrap
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.models.weights.state_dict import weights_sha256

INFO = "_kdpipe_info"


@dataclass(frozen=True)
class ModelInfo:
    """What the Python API remembers of a network that it built or trained.

    Attributes:
        config: How it was built, None for a network of the user's.
        structure: Its modules when it was built, by which later changes are noticed.
        normalize: The input scaling of its training, None before it.
        starts_from: The identity of the network before its training.
        trained_sha256: The digest of its weights after its training.
        resized_from: The (H, W) of views that were resized for it, with the side they were resized to.
        drawn_sha256: The digest of its weights when it was built, if its classifier was new.
    """

    config: ModelConfig | None = None
    structure: str = ""
    normalize: Normalization | None = None
    starts_from: dict[str, Any] | None = None
    trained_sha256: str | None = None
    resized_from: dict[tuple[int, int] | None, int] = field(default_factory=dict)
    drawn_sha256: str | None = None


def info_of(model: nn.Module) -> ModelInfo:
    """Return what is remembered of a network."""
    found = vars(model).get(INFO)
    return found if isinstance(found, ModelInfo) else ModelInfo()


def remember(model: nn.Module, info: ModelInfo) -> None:
    """Remember `info` of a network, as an attribute that copies keep."""
    vars(model)[INFO] = info


def remembering(bundle: ModelBundle) -> ModelBundle:
    """Return a loaded network that remembers its input scaling."""
    views, sides = bundle.architecture.get(VIEW_SIZE), bundle.architecture["image_size"]
    known = replace(
        info_of(bundle.model),
        normalize=bundle.normalize,
        starts_from=None,
        trained_sha256=None,
        resized_from={tuple(views): sides[0]} if views else {},
    )
    remember(bundle.model, known)
    return bundle


def network_of(given: Any, name: str) -> nn.Module | ModelBundle:
    """Return the network of a result, or what is given if it is one. Raises ModelError for others."""
    found = given
    if not isinstance(given, nn.Module | ModelBundle):
        found = getattr(given, "bundle", None) or getattr(given, "model", None)
    if isinstance(found, ModelBundle):
        return found
    if isinstance(found, nn.Module):
        return unwrap(found)
    raise ModelError(
        f"{name} must be a torch.nn.Module, what load_student returns, or the result of a training, not {shown(given)}."
    )


def given_model(model: nn.Module) -> GivenModel:
    """Return the configuration of a network object: under its name and arguments if kdpipe built it as it is."""
    config = info_of(model).config
    if config is None or info_of(model).structure != str(model):
        name = f"{OBJECT}{type(model).__module__}.{type(model).__qualname__}"
        return GivenModel(name=name, module=model)
    return GivenModel(name=config.name, args=config.args, weights=config.weights, module=model)


@isolated
def create_model(
    name: str,
    dataset: Any,
    *,
    seed: int = 0,
    weights: str | None = None,
    classes: str | None = None,
    weights_key: str | None = None,
    fresh_head: bool = False,
    output: Literal["logits", "embeddings"] = "logits",
    image_size: tuple[int, int] | None = None,
    **args: Any,
) -> nn.Module:
    """Build a network for a data set's images and classes.

    Args:
        name: A network for small images (`cnn`, `resnet20`, `wrn_16_2`, ...), one of torchvision's classifiers,
            `timm:NAME`, `hf:OWNER/NAME` or `hf:FOLDER`, `python:module:factory`, or a name given to `register_model`.
        dataset: The data set, for the shape of its images and the number of its classes.
        seed: Decides the initial weights.
        weights: "published" for those of torchvision, timm or the Hugging Face hub, or the path of a .safetensors file
            or torch state dict.
        classes: The names of the classes that the weights are of, where they are more than the data's or in another
            order: "published", or the path of a file with one class a line. The rows of the data's classes are kept.
        weights_key: The key in the file, and prefix, of the weights to take, where there are several:
            "state_dict_ema", "model.module.student".
        fresh_head: Whether the classifier is new, for weights of other classes; it has to be trained.
        output: "logits", or "embeddings" for the network without its classifier, as a teacher (`cache_teacher`).
        image_size: (H, W) of the views, if they differ from the images.
        **args: The network's own arguments, such as a width.

    Raises:
        ModelError: There is no such network or argument, or it does not fit the images.

    Example:
        >>> import kdpipe as kd
        >>> train, test = kd.load_dataset("digits")
        >>> teacher = kd.create_model("cnn", train, width=32)
        >>> sum(parameter.numel() for parameter in teacher.parameters())
        67754
    """
    images, seed = as_image_set(dataset, "train"), whole_number("seed", seed)
    size = image_size or images.image_size
    if size is None:
        raise ModelError(
            f"the images of {images.name} have different sizes: give image_size=(H, W), the size of the views."
        )
    config = ModelConfig(
        name=name,
        args=as_settings("args", args),
        weights=weights,
        weights_key=weights_key,
        fresh_head=fresh_head,
        classes=classes,
    )
    model = build_for_classes(
        config,
        () if output == "embeddings" else images.class_names,
        in_channels=images.in_channels,
        image_size=size,
        seed=seed,
        notify=lambda notice: warnings.warn(notice, stacklevel=5),
        task=images.task,
    )
    drawn = weights_sha256(model) if output == "logits" and has_new_head(config, images.num_classes) else None
    remember(model, ModelInfo(config, str(model), drawn_sha256=drawn))
    return model


def load_student(path: Any, *, model: nn.Module | None = None, trust_python: bool = False) -> ModelBundle:
    """Load a network from the files that kdpipe writes, without pickle.

    Args:
        path: The folder of a student or of one exported network, a model.safetensors, or a result, whose network it is.
        model: A network of the class of the student's, for one that was trained as a Python object; a copy gets the
            weights.
        trust_python: Whether to build a network of the user's (`python:module:factory`), which runs the code that the
            file names.

    Returns:
        The network in eval mode on the CPU, with its input scaling: `student(images)` maps uint8 images [B, C, H, W] to
        logits [B, num_classes], and `student.model` is the module.

    Raises:
        ModelError: There is no such file, it is damaged, or not from kdpipe.
    """
    if isinstance(bundle := getattr(path, "bundle", None), ModelBundle):
        return bundle
    as_path("path", path)
    file = Path(path).expanduser()
    file = file / "model.safetensors" if file.is_dir() else file
    if not file.exists() and (found := sorted(other.parent.name for other in file.parent.glob("*/model.safetensors"))):
        raise ModelError(f"{path} holds several networks, {', '.join(found)}: give the folder of one of them.")
    if file.suffix in (".onnx", ".pt2"):
        raise ModelError(f"{path} has no weights for torch: load the .safetensors file that was written beside it.")
    return remembering(rebuild(file, trust_python=trust_python, given=model))


def model_config(model: str | nn.Module, args: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return the configuration of a network that is given by name, with its arguments, or as an object."""
    if isinstance(model, str):
        return ModelConfig(name=model, args=as_settings("model_args", args))
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model is a name or a torch.nn.Module, not {type(model).__name__}.")
    if args:
        raise ModelError("args are for a model that is given by name: build this one with its arguments.")
    return given_model(unwrap(model))
