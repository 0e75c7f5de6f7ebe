"""Statistics of a layer's output that a store can hold: the feature map itself, or only what a loss needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.models.hooks import feature_shapes
from kdpipe.stages.models.tokens import PRE_LOGITS
from kdpipe.stages.targets.statistics import attention, gram, input_attention, mean_std, pool_to, pooled, spatial_gram

MAP = "features"
POOLED = "pooled"
ATTENTION = "attention"
MEAN_STD = "mean_std"
SPATIAL_GRAM = "spatial_gram"
INPUT_GRADIENT = "input_gradient"
HEAD = "head"

INPUT = "input"
"""The `layer` of features of the images themselves."""

Shape = tuple[int, ...]
"""The shape of one sample's tensor, without the batch axis."""


@dataclass(frozen=True)
class FeatureSpec:
    """A statistic of a layer's output.

    Attributes:
        layer: Module path, or "input".
        statistic: Name of the statistic.
        size: (H, W) to which the map is average-pooled first; losses that require it accept smaller maps as well.
    """

    layer: str
    statistic: str = MAP
    size: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        """Return the statistic with its size, as in recipes and stores: `pooled`, `attention-8x8`."""
        return self.statistic if self.size is None else f"{self.statistic}-{self.size[0]}x{self.size[1]}"

    @property
    def array(self) -> str:
        """Return the name of its array in a store."""
        return f"{self.kind}/{self.layer}"

    @property
    def is_head(self) -> bool:
        """Return whether it is the teacher's head, [C, D + 1] for all samples."""
        return self.statistic == HEAD

    @property
    def source(self) -> str:
        """Return what it is computed from: the layer's path, or `input_gradient`."""
        return INPUT_GRADIENT if self.statistic == INPUT_GRADIENT else self.layer

    def __str__(self) -> str:
        return self.layer if self.kind == MAP else f"{self.layer}:{self.kind}"

    def for_shape(self, shape: Shape) -> FeatureSpec:
        """Return the same for a layer whose outputs have `shape`: without a size if nothing has to be pooled."""
        if self.size is None or len(shape) != 3:
            return replace(self, size=None)
        size = min(shape[1], self.size[0]), min(shape[2], self.size[1])
        return replace(self, size=None if size == shape[1:] else size)


TEACHER_HEAD = FeatureSpec(PRE_LOGITS, HEAD)
"""The teacher's last linear layer, [C, D + 1]: its weights, and its biases in the last column. A store has it once."""

KIND = re.compile(r"([a-z_]+)(?:-([1-9]\d{0,4})x([1-9]\d{0,4}))?")


def parse_statistic(layer: str, text: str) -> FeatureSpec | None:
    """Parse a statistic as in recipes and stores (`pooled`, `attention-8x8`); None if it is not valid."""
    found = KIND.fullmatch(text)
    if (layer, text) == (PRE_LOGITS, HEAD):
        return TEACHER_HEAD
    if found is None or found[1] not in STATISTIC_FUNCTIONS or (found[2] and found[1] in UNPOOLABLE):
        return None
    if found[1] == INPUT_GRADIENT and layer != INPUT:
        return None
    return FeatureSpec(layer, found[1], (int(found[2]), int(found[3])) if found[2] else None)


def parse_feature(text: str, where: str = "cache.layers") -> FeatureSpec:
    """Parse a feature as in recipes: `layer3` for the map, `layer3:pooled` for a statistic; `where` is for errors.

    Raises:
        RecipeError: It is not valid.
    """
    layer, colon, kind = text.partition(":")
    feature = parse_statistic(layer, kind if colon else MAP) if layer else None
    if feature is None:
        raise RecipeError(
            f"{where} has {text!r}: expected a module path, optionally followed by a colon and one of "
            f"{', '.join(name for name in STATISTIC_FUNCTIONS if name not in (MAP, INPUT_GRADIENT))}; or "
            f"{INPUT}:{INPUT_GRADIENT}, or {TEACHER_HEAD}."
        )
    return feature


def compute_statistic(feature: FeatureSpec, output: Tensor) -> Tensor:
    """Compute a statistic of a layer's outputs [B, ...].

    Raises:
        ModelError: The statistic needs feature maps, and these are not.
    """
    if output.dim() != 4 and feature.statistic not in (MAP, POOLED):
        tokens = f", or {feature.layer}.patch_map of a ViT's tokens" if output.dim() == 3 else ""
        raise ModelError(
            f"{feature.layer} outputs {list(output.shape[1:])} per sample: {feature.statistic} needs feature maps "
            f"[C, H, W]. Store the output itself, or choose another layer{tokens}."
        )
    return STATISTIC_FUNCTIONS[feature.statistic](pool_to(output, feature.size) if feature.size else output)


def statistic_shape(feature: FeatureSpec, shape: Shape) -> Shape:
    """Return the shape of a statistic of outputs of `shape`. Raises like `compute_statistic`."""
    return tuple(compute_statistic(feature, torch.zeros(1, *shape)).shape[1:])


def shape_of(feature: FeatureSpec, rows: Tensor) -> Shape:
    """Return the shape of a feature [B, ...] without the batch axis; of the head, (C, D + 1)."""
    return tuple(rows.shape if feature.is_head else rows.shape[1:])


STATISTIC_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    MAP: lambda maps: maps,
    POOLED: pooled,
    MEAN_STD: mean_std,
    ATTENTION: attention,
    "gram": gram,
    SPATIAL_GRAM: spatial_gram,
    INPUT_GRADIENT: input_attention,
}

UNPOOLABLE = (POOLED, INPUT_GRADIENT)
"""Statistics that do not support pooling the map first."""


def statistic_shapes(
    model: nn.Module, features: Sequence[FeatureSpec], image_shape: tuple[int, int, int]
) -> dict[FeatureSpec, Shape]:
    """Return the shape of one sample of each feature, for images (C, H, W)."""
    shapes = source_shapes(model, features, image_shape)
    return {feature: statistic_shape(feature, shapes[feature.source]) for feature in features}


def source_shapes(
    model: nn.Module, features: Sequence[FeatureSpec], image_shape: tuple[int, int, int]
) -> dict[str, Shape]:
    """Return the shape of each feature's source, by its `source`, without the batch axis."""
    layers = [feature.layer for feature in features if feature.source == feature.layer]
    return {**feature_shapes(model, layers, image_shape), INPUT_GRADIENT: image_shape}
