"""Rebuild a network from a weights file alone, without pickle or recipe.

network = rebuild(Path("artifacts-seed0/model.safetensors"))
logits = network.model(network.normalize(images))          # uint8 [B, C, H, W] to [B, num_classes]
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.stages.compress.quantization.onnx_quantizer import OnnxQuantized
from kdpipe.stages.compress.quantize_student import INT4_LAYERS, config_of, prepare
from kdpipe.stages.compress.resume import CUTS, as_pruned
from kdpipe.stages.data.tasks import REGRESSION
from kdpipe.stages.distillation.classifier_reuse import add_projector
from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.losses.features.simkd import SimKD
from kdpipe.stages.models.build import OBJECT, GivenModel, ModelConfig, build_model
from kdpipe.stages.models.build import architecture as build_record
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.models.user_models import is_user_model
from kdpipe.stages.models.weights.state_dict import load_entries
from kdpipe.stages.plugins.user_code import is_user_reference
from kdpipe.stages.zero_shot import ZeroShot
from kdpipe.store import KdpipeError

MAX_SIZE = 8192
"""The largest width, argument or image side accepted in a record."""


def rebuild(path: Path, *, trust_python: bool = False, given: nn.Module | None = None) -> ModelBundle:
    """Build the network of a `model.safetensors` of kdpipe, in eval mode, on the CPU.

    It is pruned or not, in float or rounding as its integer file does.

    Args:
        path: The file.
        trust_python: Whether to build a user's own network (`python:module:factory`), which runs code from a module
            that the file names. Registered networks need it not: the file cannot make kdpipe import anything.
        given: The network before pruning and quantization, of which a copy gets the weights, in place of the one that
            the file names.

    Warns if the source of a user's network is not the one that the file was made from.

    Raises:
        ModelError: If the file is not from kdpipe, or is inconsistent.
    """
    tensors, record = load_tensors(path)
    try:
        architecture = _checked(record["architecture"])
        plain = {key: value for key, value in architecture.items() if key not in CUTS}
        model = _build(architecture, tensors, trust_python=trust_python, given=given)
        fresh = ModelBundle(model, plain, Normalization.from_json(record))
        network = as_pruned(fresh, architecture)
        if (config := config_of(architecture)) is not None:
            grid, int4 = architecture.get("grid", "affine"), architecture.get(INT4_LAYERS)
            rounding = prepare(network.model, image_shape_of(architecture), config, grid, int4)
            if isinstance(rounding, OnnxQuantized):
                rounding.reserve(len(tensors["file"]))
            network = ModelBundle(rounding, architecture, network.normalize)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, MemoryError, OverflowError) as error:
        raise ModelError(f"the record in {path} is damaged: it describes no valid network ({cause(error)}).") from error
    except KdpipeError as error:
        raise ModelError(f"the network in {path} cannot be built: {error}") from error
    load_entries(network.model, {"": tensors}, str(path))
    network.model.eval()
    return network


def _checked(architecture: Any) -> dict[str, Any]:
    """Reject records that would allocate unbounded memory. Raises ValueError or TypeError."""
    if not isinstance(architecture, dict) or not isinstance(architecture.get("exclude", []), list):
        raise TypeError("the architecture is not a table")
    for key, limit in (("num_classes", 10**6), ("in_channels", MAX_SIZE), ("image_size", MAX_SIZE), ("args", MAX_SIZE)):
        if (largest := _largest(architecture[key])) > limit:
            raise ValueError(f"{key} has {largest}, more than {limit}")
    if (reused := architecture.get("reused_classifier")) and _largest(reused) > MAX_SIZE:
        raise ValueError("the reused classifier is too wide")
    return architecture


def _largest(value: Any) -> float:
    """Return the largest number in a JSON value."""
    if isinstance(value, dict | list):
        return max(map(_largest, value.values() if isinstance(value, dict) else value), default=0)
    return abs(value) if isinstance(value, int | float) else 0


def image_shape_of(architecture: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (C, H, W) of a recorded network's images."""
    height, width = architecture["image_size"]
    return int(architecture["in_channels"]), int(height), int(width)


def _configured(architecture: Mapping[str, Any], *, trust_python: bool, given: nn.Module | None) -> ModelConfig:
    """Return the configuration of the recorded network; refuse code that is absent or not trusted."""
    name, args = str(architecture["model"]), dict(architecture["args"])
    if given is not None:
        return GivenModel(name=name, args=args, module=given)
    if name.startswith(OBJECT):
        raise ModelError(f"it is a Python object, {name.removeprefix(OBJECT)}: give a network of that class.")
    if is_user_reference(name) and not trust_python:
        raise ModelError(
            f"its model is {name!r}, code outside the file: pass trust_python=True if you trust that code."
        )
    if "source_sha256" in architecture and not is_user_model(name):
        raise ModelError(f"its model is {name!r}, a registered one: import the module that registers it.")
    return ModelConfig(name=name, args=args)


def _warn_of_edits(architecture: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if "source_sha256" in architecture and now.get("source_sha256") != architecture["source_sha256"]:
        warnings.warn(
            f"the source of {architecture['model']}, or of a module that it imports, was edited since the file was "
            "written: even if the weights fit, the network may compute something else.",
            stacklevel=4,
        )


def _build(
    architecture: Mapping[str, Any], tensors: Mapping[str, Tensor], *, trust_python: bool, given: nn.Module | None
) -> nn.Module:
    config = _configured(architecture, trust_python=trust_python, given=given)
    channels, height, width = image_shape_of(architecture)
    is_zero_shot = "zero_shot" in architecture
    num_classes = 0 if is_zero_shot else int(architecture["num_classes"])
    _warn_of_edits(architecture, build_record(config, num_classes, channels, (height, width)))
    model = build_model(
        config,
        num_classes=num_classes,
        in_channels=channels,
        image_size=(height, width),
        seed=0,
        task=REGRESSION,  # its outputs were checked before it was trained
    )
    if is_zero_shot:
        return ZeroShot(model, torch.zeros_like(tensors["head.weight"]), 1.0)
    if reused := architecture.get("reused_classifier"):
        loss = SimKD(
            layers=((reused["layer"], ""),),
            classifier=reused["classifier"],
            factor=reused["factor"],
        )
        add_projector(
            model,
            loss,
            (channels, height, width),
            num_features=int(reused["num_features"]),
            num_classes=num_classes,
            bias=f"{reused['classifier']}.bias" in tensors,
        )
    return model
