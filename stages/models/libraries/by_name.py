"""Networks of other libraries by name: torchvision's, timm's and transformers', and what their weights state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kdpipe.stages.models.libraries import timm, transformers
from kdpipe.stages.models.libraries.torchvision import published_categories, published_resizing
from kdpipe.stages.models.normalization import IMAGENET, Normalization, scaling_of_record

BY_PREFIX = {timm.PREFIX: timm.build_timm, transformers.PREFIX: transformers.build_transformer}
"""What builds the networks of a prefix."""


def prefix_of(name: str) -> str | None:
    """Return the prefix of a network of timm or transformers, None for others."""
    return next((prefix for prefix in BY_PREFIX if name.startswith(prefix)), None)


def class_names_of_weights(name: str, args: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the names of each class of the published weights, in order; [] if they are unknown."""
    if name.startswith(timm.PREFIX):
        return timm.timm_class_names(timm.timm_config(name))
    if name.startswith(transformers.PREFIX):
        return transformers.class_names(name, args)
    return [(each,) for each in published_categories(name)]


def num_published_classes(name: str, args: Mapping[str, Any]) -> int:
    """Return the number of classes of the published weights."""
    if name.startswith(timm.PREFIX):
        return int(timm.timm_config(name).get("num_classes", 0))
    if name.startswith(transformers.PREFIX):
        return transformers.num_labels(name, args)
    return len(published_categories(name))


def scaling_of_network(model: nn.Module, in_channels: int) -> dict[str, Normalization]:
    """Return the input scaling of a network that transformers loaded, by the place where it is stated; {} for none."""
    origin = getattr(getattr(model, "config", None), "_name_or_path", None)
    return scaling_of_weights(f"{transformers.PREFIX}{origin}", in_channels) if origin else {}


def scaling_of_weights(name: str, in_channels: int) -> dict[str, Normalization]:
    """Return the input scaling that the library states for the weights called `name`, by the place; {} for none."""
    if name.startswith(timm.PREFIX):
        where, record = "timm's configuration of the network", timm.timm_config(name)
    elif name.startswith(transformers.PREFIX):
        where, record = f"the image processor of {name}", transformers.image_scaling(name)
    else:
        return {"torchvision": IMAGENET} if in_channels == len(IMAGENET.mean) else {}
    found = scaling_of_record(record, in_channels)
    return {} if found is None else {where: found}


@dataclass(frozen=True)
class Preprocessing:
    """How images are made for the weights of a library; None for what is unknown.

    Attributes:
        size: Height and width in pixels.
        crop: The share of the shorter side that the centered crop keeps.
        interpolation: How images are resized.
    """

    size: tuple[int, int] | None = None
    crop: float | None = None
    interpolation: str | None = None


def preprocessing_of_weights(name: str) -> Preprocessing:
    """Return how the library makes the images for the weights called `name`."""
    if name.startswith(timm.PREFIX):
        config = timm.timm_config(name)
        size = config.get("input_size")
        return Preprocessing(size and tuple(size[1:]), config.get("crop_pct"), config.get("interpolation"))
    if name.startswith(transformers.PREFIX):
        return Preprocessing(*transformers.image_resizing(name))
    return Preprocessing(*published_resizing(name))
