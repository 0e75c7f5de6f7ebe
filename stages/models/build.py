"""Building the network of a recipe's [model] section, with seeded weights, checked against the data."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.stages.config import PathStr, section
from kdpipe.stages.errors import ModelError, NotLogitsError, UnknownModelError, cause
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.registry import SMALL_IMAGE_NETWORKS, build_small_image_network
from kdpipe.stages.models.torchvision import build_classifier, classifier_names, refusal
from kdpipe.stages.models.user_models import MODELS, build_user_model, is_user_model, model_source_sha256
from kdpipe.stages.models.weights import load_weights
from kdpipe.stages.numerics import PROBABILITIES, kinds_of_outputs
from kdpipe.stages.plugins.user_source import network_sha256
from kdpipe.store.errors import did_you_mean

TORCHVISION = "torchvision:"
OBJECT = "object:"
"""Prefix of the name, in records, of a network object whose class is in no registry."""

PUBLISHED = "published"

SAME_VALUES = frozenset(
    f"{name}Backward0"
    for name in ("View", "UnsafeView", "Squeeze", "Unsqueeze", "Clone", "ToCopy", "Alias", "Transpose")
) | {"SqueezeBackward1"}
"""Operations, by torch's names of their derivatives, whose outputs are the values of their inputs."""


@section
class ModelConfig:
    """Configuration of a network and its initial weights.

    Attributes:
        name: One of `list_models()`, registered ones among them, `torchvision:NAME` where the plain name is a
            small-image network's, or `python:package.module:factory`.
        args: The network's own arguments, such as a width.
        weights: None (random), "published" (torchvision's), or the path of a .safetensors file or torch state dict.
    """

    name: PathStr
    args: dict[str, Any] = field(default_factory=dict)
    weights: PathStr | None = None


@dataclass(frozen=True, kw_only=True)
class GivenModel(ModelConfig):
    """A network object with its current weights in place of a recipe's section; copies of it are trained."""

    module: nn.Module


def build_model(
    config: ModelConfig, *, num_classes: int, in_channels: int, image_size: tuple[int, int], seed: int
) -> nn.Module:
    """Build the network on the CPU, in training mode: images [B, in_channels, *image_size] -> logits [B, num_classes].

    Equal seeds give equal weights, and torch's global generators are left unchanged. Raises ModelError for an unknown
    name, unknown arguments, images that do not fit the network, or weights that cannot be loaded.
    """
    if isinstance(config, GivenModel):
        given = _copy(config.module)
        _check_fit(type(given).__name__, given, num_classes, (in_channels, *image_size))
        return given
    # On the CPU only: torch.manual_seed would also reset the generators of every GPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _construct(config, num_classes, in_channels, image_size)
        _check_fit(config.name, model, num_classes, (in_channels, *image_size))
    if config.weights is not None and config.weights != PUBLISHED:
        load_weights(model, weights_path(config.weights))
    return model


def architecture(
    config: ModelConfig, num_classes: int, in_channels: int, image_size: tuple[int, int]
) -> dict[str, Any]:
    """Return the network's description without weights, as JSON.

    Defaults of small-image networks are included, and the digest of the source of a user's own network. Raises
    ModelError if there is no source, or `args` are no JSON.
    """
    args = _default_args(config.name) | config.args
    own = network_sha256(config.module) if isinstance(config, GivenModel) and config.name.startswith(OBJECT) else {}
    try:
        args = json.loads(json.dumps(args, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"the args of {config.name} must be numbers, strings, lists and tables ({cause(error)})."
        ) from error
    source = model_source_sha256(config.name)
    return {
        "model": config.name,
        "args": args,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "image_size": list(image_size),
        **({"source_sha256": source} if source else {}),
        **own,
    }


def _copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network object on the CPU, without hooks. Raises ModelError if it cannot be copied or run."""
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(f"{name} is a TorchScript module: give the nn.Module that it was made from.")
    for what, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta or nn.parameter.is_lazy(tensor):
            raise ModelError(f"{name}: {what} has no values yet: initialize the network on the CPU first.")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ModelError(f"{name}: {what} is {tensor.dtype}, wanted torch.float32: call .float() first.")
        if tensor.is_inference():
            raise ModelError(f"{name} was built in torch.inference_mode: build it outside.")
    try:
        return clone_without_hooks(model).cpu()
    except Exception as error:  # attributes of the user's
        raise ModelError(f"{name} cannot be copied ({cause(error)}): remove what cannot be, such as locks.") from error


def list_models() -> list[str]:
    """List the names that ModelConfig accepts: registered and small-image networks, then torchvision's."""
    plain = [*MODELS.registered(), *sorted(SMALL_IMAGE_NETWORKS)]
    return plain + [TORCHVISION + name if name in SMALL_IMAGE_NETWORKS else name for name in classifier_names()]


def _construct(config: ModelConfig, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    name, is_published = config.name.removeprefix(TORCHVISION), config.weights == PUBLISHED
    is_small, is_own = config.name in SMALL_IMAGE_NETWORKS, is_user_model(config.name)
    if not is_small and not is_own and name in classifier_names():
        return build_classifier(
            name, config.args, num_classes=num_classes, in_channels=in_channels, published=is_published
        )
    if not is_small and not is_own:
        raise refusal(name) or _unknown(config.name)
    if is_published:
        raise ModelError(
            f"there are no published weights of {config.name}: give the path of a file, or leave weights out."
        )
    offered: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    if is_own:
        return build_user_model(config.name, config.args, offered)
    return build_small_image_network(config.name, config.args, **offered)


def _unknown(name: str) -> ModelError:
    known = [TORCHVISION + known for known in classifier_names()] if name.startswith(TORCHVISION) else list_models()
    otherwise = "name your own network as python:package.module:factory, or import the module that registers it."
    hint = did_you_mean(name, known, limit=3, otherwise=otherwise)
    return UnknownModelError(f"no model is called {name!r}; {hint}")


def _default_args(name: str) -> dict[str, Any]:
    if name not in SMALL_IMAGE_NETWORKS:
        return {}
    parameters = inspect.signature(SMALL_IMAGE_NETWORKS[name].build).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def _check_fit(name: str, model: nn.Module, num_classes: int, image_shape: tuple[int, int, int]) -> None:
    """Run two black images through the network, to find a misfit before any data is read."""
    images = " x ".join(str(side) for side in image_shape)
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *image_shape))
    except Exception as error:  # networks may raise anything on a misfit
        raise ModelError(f"{name} cannot take images of {images} ({cause(error)}).") from error
    model.train()
    if not isinstance(logits, Tensor):
        raise ModelError(f"{name} returns {type(logits).__name__}, wanted a tensor of logits [B, {num_classes}].")
    if list(logits.shape) != [2, num_classes]:
        raise ModelError(
            f"{name} makes {list(logits.shape)} of two images of {images}, wanted logits [2, {num_classes}]."
        )
    if bool(((logits >= 0) & (logits <= 1)).all()) and (kind := _probabilities_of(model, image_shape)):
        raise NotLogitsError(
            f"{name} ends in a {kind}: its outputs are probabilities, and losses and stores take logits. Return what "
            f"goes into the {kind}."
        )


def _probabilities_of(model: nn.Module, image_shape: tuple[int, int, int]) -> str | None:
    """Return "softmax" or "sigmoid" if the network's last operation is one, else None."""
    ramp = torch.linspace(-1, 1, math.prod(image_shape)).view(1, *image_shape)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            outputs = model(torch.cat([ramp, ramp.flip(1, 2, 3)]).requires_grad_().clone())
    except Exception:  # it cannot be differentiated
        return None
    finally:
        model.train(was_training)
    if PROBABILITIES in kinds_of_outputs(outputs.detach()) and not torch.equal(*outputs.detach()):
        return "softmax"
    node = outputs.grad_fn
    while node is not None and node.name() in SAME_VALUES:
        node = node.next_functions[0][0]
    return "sigmoid" if node is not None and node.name() == "SigmoidBackward0" else None


def weights_path(text: str) -> Path:
    """Return the path of a weights file as the recipe writes it. Raises ModelError for `~` without a home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ModelError(f"weights = {text!r}: there is no home folder, give the absolute path.") from error
