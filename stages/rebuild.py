"""A network built again from a file of weights alone, without pickle or recipe: its header says what to build.

network = rebuild(Path("artefacts-seed0/model.safetensors"))
logits = network.model(network.normalise(images))          # uint8 [B, C, H, W] to [B, num_classes]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stages.errors import ModelError, cause
from stages.lesson import Normalisation
from stages.losses.simkd import SimKDConfig
from stages.models.build import ModelConfig, build_model
from stages.models.weights import load_entries
from stages.network import Network
from stages.python_reference import is_user_reference
from stages.quantize_student import config_of, prepare
from stages.reuse_classifier import with_projector
from stages.start_file import with_widths
from stages.tensor_file import load_tensors
from store import KdpipeError

MOST = 8192
"""No width, argument or side of an image in a record may be larger."""


def rebuild(path: Path, *, trust_python: bool = False) -> Network:
    """The network in a `model.safetensors` of kdpipe's, in eval mode, on the CPU: pruned or not, in float or rounding
    as its integer file does.

    trust_python: whether a network that is a user's own function (`python:module:factory`) may be built, which runs the
    code of a module that the file names. Raises ModelError where the file is none of kdpipe's, or does not fit itself.
    """
    tensors, record = load_tensors(path)
    try:
        architecture = _sane(record["architecture"])
        plain = {key: value for key, value in architecture.items() if key != "widths"}
        model = _build(architecture, tensors, trust_python=trust_python)
        fresh = Network(model, plain, Normalisation.from_json(record))
        network = with_widths(fresh, architecture.get("widths"))
        if (config := config_of(architecture)) is not None:
            rounding = prepare(network.model, image_shape_of(architecture), config)
            network = Network(rounding, architecture, network.normalise)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, MemoryError, OverflowError) as error:
        raise ModelError(f"the record in {path} does not say what to build ({cause(error)}): it is damaged.") from error
    except KdpipeError as error:
        raise ModelError(f"the network in {path} cannot be built: {error}") from error
    load_entries(network.model, tensors, str(path))
    network.model.eval()
    return network


def _sane(architecture: Any) -> dict[str, Any]:
    """A record of ordinary sizes: a stranger's must not ask for all memory. ValueError or TypeError if it is none."""
    if not isinstance(architecture, dict) or not isinstance(architecture.get("keep_float", []), list):
        raise TypeError("the architecture is no table of what to build")
    for key, most in (("num_classes", 10**6), ("in_channels", MOST), ("image_size", MOST), ("args", MOST)):
        if (largest := _largest(architecture[key])) > most:
            raise ValueError(f"{key} holds {largest}, more than {most}")
    if (reused := architecture.get("reused_classifier")) and _largest(reused) > MOST:
        raise ValueError("the reused classifier is too wide")
    return architecture


def _largest(value: Any) -> float:
    """The largest number in a JSON value."""
    if isinstance(value, dict | list):
        return max(map(_largest, value.values() if isinstance(value, dict) else value), default=0)
    return abs(value) if isinstance(value, int | float) else 0


def image_shape_of(architecture: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of the images that a recorded network takes."""
    height, width = architecture["image_size"]
    return int(architecture["in_channels"]), int(height), int(width)


def _build(architecture: Mapping[str, Any], tensors: Mapping[str, Tensor], *, trust_python: bool) -> nn.Module:
    name = str(architecture["model"])
    if is_user_reference(name) and not trust_python:
        raise ModelError(
            f"it is {name!r}, code that the file only names: pass trust_python=True if you know that code."
        )
    channels, height, width = image_shape_of(architecture)
    model = build_model(
        ModelConfig(name=name, args=dict(architecture["args"])),
        num_classes=int(architecture["num_classes"]),
        in_channels=channels,
        image_size=(height, width),
        seed=0,
    )
    if reused := architecture.get("reused_classifier"):
        pair = (reused["layer"], "")
        config = SimKDConfig(
            loss="simkd", layers=(pair,), classifier=(reused["classifier"], ""), factor=reused["factor"]
        )
        with_projector(
            model,
            config,
            (channels, height, width),
            num_features=int(reused["num_features"]),
            num_classes=int(architecture["num_classes"]),
            bias=f"{reused['classifier']}.bias" in tensors,
        )
    return model
