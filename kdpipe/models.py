"""Networks of the Python API: build them by name, load those that kdpipe has written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kdpipe.datasets import as_image_set
from kdpipe.runs import isolated
from kdpipe.stages.compress.artifacts.load import rebuild
from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.build import OBJECT, GivenModel, ModelConfig, build_model
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.clone import unwrap
from kdpipe.stages.models.normalization import Normalization

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
    """

    config: ModelConfig | None = None
    structure: str = ""
    normalize: Normalization | None = None
    starts_from: dict[str, Any] | None = None
    trained_sha256: str | None = None


def info_of(model: nn.Module) -> ModelInfo:
    """Return what is remembered of a network."""
    found = vars(model).get(INFO)
    return found if isinstance(found, ModelInfo) else ModelInfo()


def remember(model: nn.Module, info: ModelInfo) -> None:
    """Remember `info` of a network, as an attribute that copies keep."""
    vars(model)[INFO] = info


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
    image_size: tuple[int, int] | None = None,
    **args: Any,
) -> nn.Module:
    """Build a network for a data set's images and classes.

    Args:
        name: A network for small images (`cnn`, `resnet20`, `wrn_16_2`, ...), one of torchvision's classifiers,
            `python:module:factory`, or a name given to `register_model`.
        dataset: The data set, for the shape of its images and the number of its classes.
        seed: Decides the initial weights.
        weights: "published" for torchvision's, or the path of a .safetensors file or torch state dict.
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
    images = as_image_set(dataset, "train")
    size = image_size or images.image_size
    if size is None:
        raise ModelError(
            f"the images of {images.name} have different sizes: give image_size=(H, W), the size of the views."
        )
    config = ModelConfig(name=name, args=args, weights=weights)
    model = build_model(
        config, num_classes=images.num_classes, in_channels=images.in_channels, image_size=size, seed=seed
    )
    remember(model, ModelInfo(config, str(model)))
    return model


def load_student(path: str | Path, *, model: nn.Module | None = None, trust_python: bool = False) -> ModelBundle:
    """Load a network from the files that kdpipe writes, without pickle.

    Args:
        path: A folder of artifacts, the folder of a student, or a model.safetensors.
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
    path = Path(path).expanduser()
    return rebuild(path / "model.safetensors" if path.is_dir() else path, trust_python=trust_python, given=model)


def model_config(model: str | nn.Module, args: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return the configuration of a network that is given by name, with its arguments, or as an object."""
    if isinstance(model, str):
        return ModelConfig(name=model, args=dict(args or {}))
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model is a name or a torch.nn.Module, not {type(model).__name__}.")
    if args:
        raise ModelError("args are for a model that is given by name: build this one with its arguments.")
    return given_model(unwrap(model))
