"""Input normalization: (pixel / 255 - mean) / std."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdpipe.stages.errors import RunError


@dataclass(frozen=True)
class Normalization:
    """A model's scaling of its input: (pixel / 255 - mean) / std for each channel, applied after the views."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Scale images uint8 [B, C, H, W] to float32 [B, C, H, W]."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)

    def to_pixel_gradient(self, gradient: Tensor) -> Tensor:
        """Convert a gradient by the normalized input, [B, C, H, W], to one by pixels in [0, 1].

        It is then comparable between models of different scalings.
        """
        return gradient / torch.tensor(self.std, device=gradient.device, dtype=gradient.dtype).view(-1, 1, 1)

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
