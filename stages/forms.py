"""What of a layer's feature map a store keeps: the map as it is, or the statistic that a loss needs and no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.errors import ModelError, RecipeError

MAP = "features"


@dataclass(frozen=True)
class Wanted:
    """One form of one layer's output; `array` is where a store keeps it."""

    layer: str
    form: str = MAP

    @property
    def array(self) -> str:
        return f"{self.form}/{self.layer}"


def parse_wanted(text: str) -> Wanted:
    """A layer as a recipe names it: `layer3`, its map, or `layer3:pooled`, a statistic. Raises RecipeError."""
    layer, colon, form = text.partition(":")
    if not layer or (colon and form not in FORMS):
        raise RecipeError(
            f"cache.layers has {text!r}: it takes the path of a module, and after a colon one of "
            f"{', '.join(name for name in FORMS if name != MAP)} where not the whole map is kept."
        )
    return Wanted(layer, form or MAP)


def take_form(wanted: Wanted, feature: Tensor) -> Tensor:
    """The wanted form of a batch of a layer's outputs [B, ...]. Raises ModelError where they are no maps."""
    if wanted.form != MAP and feature.dim() != 4:
        raise ModelError(
            f"{wanted.layer} gives {list(feature.shape[1:])} a sample: {wanted.form} is of feature maps [C, H, W]. "
            "Keep it as it is, or name another layer."
        )
    return FORMS[wanted.form](feature)


def pooled(maps: Tensor) -> Tensor:
    """The mean over each map: [B, C, H, W] to [B, C], float32."""
    return maps.float().mean((2, 3))


def attention(maps: Tensor) -> Tensor:
    """Where the layer is active: the mean over channels of the squares, each sample's map scaled to length 1.

    [B, C, H, W] to [B, H, W], float32. Zagoruyko and Komodakis 2017 (arXiv 1612.03928), activation-based, p = 2.
    """
    energy = maps.float().square().mean(1)
    return F.normalize(energy.flatten(1), dim=1).view_as(energy)


def gram(maps: Tensor) -> Tensor:
    """How channels go together: [B, C, H, W] to [B, C, C], the mean over positions of products, float32."""
    flat = maps.float().flatten(2)
    return torch.bmm(flat, flat.transpose(1, 2)) / flat.shape[2]


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    MAP: lambda maps: maps,
    "pooled": pooled,
    "attention": attention,
    "gram": gram,
}
