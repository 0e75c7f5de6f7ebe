"""Statistics of a layer's output that a store can hold: the feature map itself, or only what a loss needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.errors import ModelError, RecipeError

MAP = "features"
POOLED = "pooled"
ATTENTION = "attention"
SPATIAL_GRAM = "spatial_gram"
INPUT_GRADIENT = "input_gradient"

INPUT = "input"
"""The `layer` of features of the images themselves."""

NO_GRADIENT = 1e-12
"""Gradients whose largest element is below this count as zero: scaling them up would only show rounding errors."""

Shape = tuple[int, ...]
"""The shape of one sample's tensor, without the batch axis."""


@dataclass(frozen=True)
class Wanted:
    """A statistic of a layer's output.

    Attributes:
        layer: Module path, or "input".
        form: Name of the statistic.
        size: (H, W) to which the map is average-pooled first; losses that require it accept smaller maps as well.
    """

    layer: str
    form: str = MAP
    size: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        """Return the statistic with its size, as in recipes and stores: `pooled`, `attention-8x8`."""
        return self.form if self.size is None else f"{self.form}-{self.size[0]}x{self.size[1]}"

    @property
    def array(self) -> str:
        """Return the name of its array in a store."""
        return f"{self.kind}/{self.layer}"

    @property
    def source(self) -> str:
        """Return what it is computed from: the layer's path, or `input_gradient`."""
        return INPUT_GRADIENT if self.form == INPUT_GRADIENT else self.layer

    def __str__(self) -> str:
        return self.layer if self.kind == MAP else f"{self.layer}:{self.kind}"

    def fitted(self, shape: Shape) -> Wanted:
        """Return the same for a layer whose outputs have `shape`: without a size if nothing has to be pooled."""
        if self.size is None or len(shape) != 3:
            return replace(self, size=None)
        size = min(shape[1], self.size[0]), min(shape[2], self.size[1])
        return replace(self, size=None if size == shape[1:] else size)


KIND = re.compile(r"([a-z_]+)(?:-([1-9]\d{0,4})x([1-9]\d{0,4}))?")


def parse_kind(layer: str, text: str) -> Wanted | None:
    """Parse a statistic as in recipes and stores (`pooled`, `attention-8x8`); None if it is not valid."""
    found = KIND.fullmatch(text)
    if found is None or found[1] not in FORMS or (found[2] and found[1] in UNSIZED):
        return None
    if found[1] == INPUT_GRADIENT and layer != INPUT:
        return None
    return Wanted(layer, found[1], (int(found[2]), int(found[3])) if found[2] else None)


def parse_wanted(text: str) -> Wanted:
    """Parse a feature as in recipes: `layer3` for the map, `layer3:pooled` for a statistic.

    Raises:
        RecipeError: It is not valid.
    """
    layer, colon, kind = text.partition(":")
    wanted = parse_kind(layer, kind if colon else MAP) if layer else None
    if wanted is None:
        raise RecipeError(
            f"cache.layers has {text!r}: expected a module path, optionally followed by a colon and one of "
            f"{', '.join(name for name in FORMS if name not in (MAP, INPUT_GRADIENT))}; or {INPUT}:{INPUT_GRADIENT}."
        )
    return wanted


def take_form(wanted: Wanted, feature: Tensor) -> Tensor:
    """Compute a statistic of a layer's outputs [B, ...].

    Raises:
        ModelError: The statistic needs feature maps, and these are not.
    """
    if feature.dim() != 4 and wanted.form not in (MAP, POOLED):
        raise ModelError(
            f"{wanted.layer} outputs {list(feature.shape[1:])} per sample: {wanted.form} needs feature maps [C, H, W]. "
            "Store the output itself, or choose another layer."
        )
    return FORMS[wanted.form](pool_to(feature, wanted.size) if wanted.size else feature)


def form_shape(wanted: Wanted, shape: Shape) -> Shape:
    """Return the shape of a statistic of outputs of `shape`. Raises like `take_form`."""
    return tuple(take_form(wanted, torch.zeros(1, *shape)).shape[1:])


def pool_to(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool maps [B, C, H, W] to (H, W) = `size`, never enlarging a side; return other features unchanged."""
    if maps.dim() != 4:
        return maps
    smaller = min(maps.shape[2], size[0]), min(maps.shape[3], size[1])
    return maps if smaller == maps.shape[2:] else F.adaptive_avg_pool2d(maps, smaller)


def pooled(features: Tensor) -> Tensor:
    """Average maps [B, C, H, W] or tokens [B, L, C] over positions to [B, C], in float32 or wider; vectors stay."""
    if features.dim() == 3:
        return widened(features).mean(1)
    return widened(features).flatten(2).mean(2) if features.dim() > 3 else widened(features)


def attention(maps: Tensor) -> Tensor:
    """Compute attention maps: the mean over channels of the squares, L2-normalized per sample.

    [B, C, H, W] to [B, H, W], in float32 or wider. Zagoruyko and Komodakis 2017 (arXiv 1612.03928), activation-based,
    p = 2.
    """
    energy = widened(maps).square().mean(1)
    return F.normalize(energy.flatten(1), dim=1).view_as(energy)


def input_attention(gradient: Tensor) -> Tensor:
    """Compute the attention maps [B, H, W] of gradients [B, C, H, W], in float32 or wider, however small they are.

    A confident network has gradients of 1e-7 and less, whose squares would vanish beside the eps of the normalization.
    Scaling by a constant first changes neither the map nor its gradient.
    """
    gradient = widened(gradient)
    largest = gradient.detach().abs().amax((1, 2, 3), keepdim=True)
    return attention(gradient / largest.clamp_min(NO_GRADIENT))


def gram(maps: Tensor) -> Tensor:
    """Compute Gram matrices of channels, [B, C, H, W] to [B, C, C]: the mean over positions of products, float32."""
    flat = maps.float().flatten(2)
    return torch.bmm(flat, flat.transpose(1, 2)) / flat.shape[2]


def spatial_gram(maps: Tensor) -> Tensor:
    """Compute Gram matrices of positions, [B, C, H, W] to [B, H W, H W], in float32 or wider.

    The mean over channels of products of L2-normalized channel maps. Huang and Wang 2017 (arXiv 1707.01219), section
    4.2.
    """
    flat = F.normalize(widened(maps).flatten(2), dim=2)
    return torch.bmm(flat.transpose(1, 2), flat) / flat.shape[1]


def widened(values: Tensor) -> Tensor:
    """Return the values in float32 or wider: half precision loses sums over maps and the tail of a softmax."""
    return values if values.dtype.itemsize >= 4 else values.float()


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    MAP: lambda maps: maps,
    POOLED: pooled,
    ATTENTION: attention,
    "gram": gram,
    SPATIAL_GRAM: spatial_gram,
    INPUT_GRADIENT: input_attention,
}

UNSIZED = (POOLED, INPUT_GRADIENT)
"""Statistics that do not support pooling the map first."""
