"""Input normalization: (pixel / 255 - mean) / std."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError, RecipeError, RunError
from kdpipe.stages.models.safetensors_io import RECORD
from kdpipe.store.errors import KdpipeError
from kdpipe.store.fs.safe_read import read_json

CONFIGS = ("config.json", "preprocessor_config.json")
"""Files beside downloaded weights that have their input scaling, as timm and transformers write them."""

MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class Normalization:
    """A model's scaling of its input: (pixel / 255 - mean) / std for each channel, applied after the views."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Scale images uint8 [B, C, H, W] to float32 [B, C, H, W]. Raises ModelError for others, scaled before."""
        if images.dtype != torch.uint8 or images.ndim < 3 or images.shape[-3] != len(self.mean):
            raise ModelError(
                f"the input scaling is for raw images, uint8 [B, {len(self.mean)}, H, W], not "
                f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}: it divides by 255 itself."
            )
        mean, std = (_per_channel_on(images.device, values) for values in (self.mean, self.std))
        return images.float().div_(255).sub_(mean).div_(std)

    def __str__(self) -> str:
        return f"mean = {list(self.mean)} and std = {list(self.std)}"

    def to_pixel_gradient(self, gradient: Tensor) -> Tensor:
        """Convert a gradient by the normalized input, [B, C, H, W], to one by pixels in [0, 1].

        It is then comparable between models of different scalings.
        """
        return gradient / _per_channel_on(gradient.device, self.std).to(gradient.dtype)

    def to_json(self) -> dict[str, list[float]]:
        return {"mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Normalization:
        """Read the scaling from the record in a network's weights file; raises RunError if it is absent or invalid."""
        try:
            scaling = record["normalization"]
            mean, std = (tuple(map(float, scaling[name])) for name in ("mean", "std"))
        except (KeyError, TypeError, ValueError) as error:
            raise RunError("the network's weights file has no input normalization: train it again.") from error
        if not all(map(math.isfinite, (*mean, *std))) or min(std, default=0) <= 0:
            raise RunError(f"the network's normalization is invalid, mean {mean} and std {std}: train it again.")
        return Normalization(mean, std)


@lru_cache(maxsize=64)
def _per_channel_on(device: torch.device, values: tuple[float, ...]) -> Tensor:
    """Return values as float32 [C, 1, 1], uploaded once: an upload in each batch would wait for the GPU."""
    with torch.inference_mode(mode=False):  # used in backward passes too
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Numbers = float | Sequence[float]
"""A number for all channels, or one for each."""


def as_normalization(
    given: Normalization | tuple[Numbers, Numbers], in_channels: int, *, name: str = "normalize"
) -> Normalization:
    """Return an input scaling that is given as one, or as mean and standard deviation for pixels in [0, 1].

    Args:
        given: The scaling, or (mean, std).
        in_channels: The channels of the images.
        name: The argument's name, for messages.

    Raises:
        RecipeError: It is neither, does not fit the channels, or is for pixels up to 255.
    """
    if isinstance(given, Normalization) and len(given.mean) == len(given.std) == in_channels:
        return given
    try:
        parts = (given.mean, given.std) if isinstance(given, Normalization) else given
        mean, std = (_per_channel(part, in_channels) for part in parts)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"{name} is {given!r:.80}: give (mean, std), each a number or one for each channel, for pixels in [0, 1]."
        ) from error
    if not len(mean) == len(std) == in_channels:
        raise RecipeError(
            f"mean {list(mean)} and std {list(std)} do not fit images of {in_channels} channels: give one number, or "
            "one for each channel."
        )
    if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
        raise RecipeError(
            f"mean {list(mean)} and std {list(std)} are not those of pixels in [0, 1]: means must be within [0, 1], "
            "standard deviations above 0 and at most 1; divide those of pixels up to 255 by 255."
        )
    return Normalization(mean, std)


def _per_channel(values: Any, in_channels: int) -> tuple[float, ...]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim > 1:
        raise ValueError("it has more than one axis")
    return tuple(numbers.tolist()) if numbers.ndim else (float(numbers),) * in_channels


def stated_scalings(model: nn.Module, weights: Path | None, in_channels: int) -> dict[str, Normalization]:
    """Return the input scalings that a network and its weights file come with, by the place where each is stated.

    Places are timm's configuration on the network, the record in a weights file of kdpipe, and the files beside
    weights that are named in CONFIGS or have the same name with the suffix .json. What does not fit the channels is
    left out.
    """
    found: dict[str, Normalization] = {}
    for where, record in _records(model, weights):
        if (scaling := scaling_of_record(record, in_channels)) is not None:
            found[where] = scaling
    return found


def scaling_of_record(record: Mapping[str, Any], in_channels: int) -> Normalization | None:
    """Return the input scaling that a record of timm, transformers or kdpipe states, None if it fits no channels."""
    values = [record[key] for key in ("mean", "std") if key in record]
    values = values or [record[key] for key in ("image_mean", "image_std") if key in record]
    try:
        mean, std = values
        return as_normalization((mean, std), in_channels)
    except (TypeError, ValueError, RecipeError):
        return None


def _records(model: nn.Module, weights: Path | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the places that may state an input scaling, with their records."""
    configs = (getattr(module, "pretrained_cfg", None) for module in model.modules())
    if isinstance(config := next((one for one in configs if one is not None), None), Mapping):
        yield "timm's configuration of the network", config
    if weights is None or not weights.is_file():
        return
    try:
        with safetensors.safe_open(weights, "pt") as file:
            record = json.loads((file.metadata() or {})[RECORD])["normalization"]
            yield str(weights), record if isinstance(record, Mapping) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError):
        pass  # not from kdpipe
    for path in (*(weights.with_name(name) for name in CONFIGS), weights.with_suffix(".json")):
        try:
            config = read_json(path, MAX_CONFIG_BYTES)
        except (OSError, KdpipeError):
            continue
        own = next((config[key] for key in ("pretrained_cfg", "normalization") if key in config), config)
        yield str(path), own if isinstance(own, Mapping) else {}
