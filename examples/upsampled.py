"""A network of timm that enlarges its images first: small images and views, a teacher that was trained on large ones.

[teacher.model]
name = "python:examples.upsampled:create"
args = { name = "tf_efficientnet_lite0", size = 96 }
weights = "tf_efficientnet_lite0.safetensors"     # timm's keys
fresh_head = true
"""

from __future__ import annotations

from typing import Any

import timm
import torch.nn.functional as F
from torch import Tensor, nn


def create(*, name: str, size: int, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    """Build timm's network `name` for images [B, in_channels, h, w] of any size, enlarged to `size` pixels a side.

    The keys of its weights stay timm's.
    """
    model = timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **options)

    class Upsampled(type(model)):  # type: ignore[misc]
        def forward(self, images: Tensor) -> Tensor:
            large = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False)
            return super().forward(large)  # type: ignore[no-any-return]

    model.__class__ = Upsampled
    return model
