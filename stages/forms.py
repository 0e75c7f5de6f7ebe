"""What of a layer's output a store keeps: the feature map as it is, or the statistic that a loss needs and no more."""

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
"""The `layer` of what is about the images themselves."""

NO_GRADIENT = 1e-12
"""A gradient whose largest number is below this counts as none: scaling it up would only show rounding errors."""

Shape = tuple[int, ...]
"""Of one sample's tensor, without the batch axis."""


@dataclass(frozen=True)
class Wanted:
    """One form of one layer's output; `array` is where a store keeps it.

    size: where set, the map is first pooled to (H, W); a loss that asks for it takes any smaller map as well.
    """

    layer: str
    form: str = MAP
    size: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        """The form with its size, as recipes and stores spell it."""
        return self.form if self.size is None else f"{self.form}-{self.size[0]}x{self.size[1]}"

    @property
    def array(self) -> str:
        return f"{self.kind}/{self.layer}"

    @property
    def source(self) -> str:
        """What it is made of: the layer's output, or the gradient by the pixels."""
        return INPUT_GRADIENT if self.form == INPUT_GRADIENT else self.layer

    def __str__(self) -> str:
        return self.layer if self.kind == MAP else f"{self.layer}:{self.kind}"

    def fitted(self, shape: Shape) -> Wanted:
        """The same for a layer whose outputs have `shape`: without a size where nothing has to be pooled."""
        if self.size is None or len(shape) != 3:
            return replace(self, size=None)
        size = min(shape[1], self.size[0]), min(shape[2], self.size[1])
        return replace(self, size=None if size == shape[1:] else size)


KIND = re.compile(r"([a-z_]+)(?:-([1-9]\d{0,4})x([1-9]\d{0,4}))?")


def parse_kind(layer: str, text: str) -> Wanted | None:
    """A form as recipes and stores spell it (`pooled`, `attention-8x8`) of a layer; None where there is none such."""
    found = KIND.fullmatch(text)
    if found is None or found[1] not in FORMS or (found[2] and found[1] in UNSIZED):
        return None
    if found[1] == INPUT_GRADIENT and layer != INPUT:
        return None
    return Wanted(layer, found[1], (int(found[2]), int(found[3])) if found[2] else None)


def parse_wanted(text: str) -> Wanted:
    """A layer as a recipe names it: `layer3`, its map, or `layer3:pooled`, a statistic. Raises RecipeError."""
    layer, colon, kind = text.partition(":")
    wanted = parse_kind(layer, kind if colon else MAP) if layer else None
    if wanted is None:
        raise RecipeError(
            f"cache.layers has {text!r}: it takes the path of a module, and after a colon one of "
            f"{', '.join(name for name in FORMS if name not in (MAP, INPUT_GRADIENT))} where not the whole map is "
            f"kept; or {INPUT}:{INPUT_GRADIENT}."
        )
    return wanted


def take_form(wanted: Wanted, feature: Tensor) -> Tensor:
    """The wanted form of a batch of a layer's outputs [B, ...]. Raises ModelError where they are no maps."""
    if feature.dim() != 4 and wanted.form not in (MAP, POOLED):
        raise ModelError(
            f"{wanted.layer} gives {list(feature.shape[1:])} a sample: {wanted.form} is of feature maps [C, H, W]. "
            "Keep it as it is, or name another layer."
        )
    return FORMS[wanted.form](pool_to(feature, wanted.size) if wanted.size else feature)


def form_shape(wanted: Wanted, shape: Shape) -> Shape:
    """The shape of the wanted form of outputs of `shape`. Raises ModelError where they are no maps."""
    return tuple(take_form(wanted, torch.zeros(1, *shape)).shape[1:])


def pool_to(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, C, H, W], each side that is longer than in `size` averaged down to that; what is no map as it is."""
    if maps.dim() != 4:
        return maps
    smaller = min(maps.shape[2], size[0]), min(maps.shape[3], size[1])
    return maps if smaller == maps.shape[2:] else F.adaptive_avg_pool2d(maps, smaller)


def pooled(features: Tensor) -> Tensor:
    """The mean over positions: maps [B, C, H, W] or tokens [B, L, C] to [B, C], in float32 or wider; vectors stay."""
    if features.dim() == 3:
        return widened(features).mean(1)
    return widened(features).flatten(2).mean(2) if features.dim() > 3 else widened(features)


def attention(maps: Tensor) -> Tensor:
    """Where the layer is active: the mean over channels of the squares, each sample's map scaled to length 1.

    [B, C, H, W] to [B, H, W], in float32 or wider. Zagoruyko and Komodakis 2017 (arXiv 1612.03928), activation-based,
    p = 2.
    """
    energy = widened(maps).square().mean(1)
    return F.normalize(energy.flatten(1), dim=1).view_as(energy)


def input_attention(gradient: Tensor) -> Tensor:
    """The attention map [B, H, W] of gradients [B, C, H, W], in float32 or wider, of length 1 however small they are.

    A network that is sure has gradients of 1e-7 and less, whose squares would vanish beside the guard against a
    division by zero. Scaling by a constant first changes neither the map nor its gradient.
    """
    gradient = widened(gradient)
    largest = gradient.detach().abs().amax((1, 2, 3), keepdim=True)
    return attention(gradient / largest.clamp_min(NO_GRADIENT))


def gram(maps: Tensor) -> Tensor:
    """How channels go together: [B, C, H, W] to [B, C, C], the mean over positions of products, float32."""
    flat = maps.float().flatten(2)
    return torch.bmm(flat, flat.transpose(1, 2)) / flat.shape[2]


def spatial_gram(maps: Tensor) -> Tensor:
    """How positions go together: [B, C, H, W] to [B, H W, H W], in float32 or wider, the mean over channels of products
    of channel maps that are each scaled to length 1. Huang and Wang 2017 (arXiv 1707.01219), section 4.2.
    """
    flat = F.normalize(widened(maps).flatten(2), dim=2)
    return torch.bmm(flat.transpose(1, 2), flat) / flat.shape[1]


def widened(values: Tensor) -> Tensor:
    """float32 at the least: sums over a map, and the tail of a softmax, are lost in half precision."""
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
"""Forms for which pooling the map first means nothing."""
