"""Networks that are Python objects: what the Python API is given, or has built, instead of a name in a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from kdpipe.stages.models.build import OBJECT, GivenModel, ModelConfig
from kdpipe.stages.models.normalization import Normalization

INFO = "_kdpipe_info"


@dataclass(frozen=True)
class ModelInfo:
    """What the Python API remembers of a network that it built or trained.

    Attributes:
        config: How it was built, None for a network of the user's.
        normalize: The input scaling of its training, None before it.
        starts_from: The identity of the network before its training.
        trained_sha256: The digest of its weights after its training.
    """

    config: ModelConfig | None = None
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
    """Return the configuration of a network object: under its name and arguments if kdpipe built it."""
    config = info_of(model).config
    if config is None:
        name = f"{OBJECT}{type(model).__module__}.{type(model).__qualname__}"
        return GivenModel(name=name, module=model)
    return GivenModel(name=config.name, args=config.args, weights=config.weights, module=model)
