"""Small user networks for tests, as in `python:tiny_families:vit`."""

from __future__ import annotations

from torch import Tensor, nn


def vit(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """Build a vision transformer: two layers of two heads over patches of 4 x 4 pixels."""
    from torchvision.models import VisionTransformer

    assert in_channels == 3
    return VisionTransformer(
        image_size=image_size[0],
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=num_classes,
    )


def mobilenet(num_classes: int) -> nn.Module:
    """Build MobileNetV2 with three inverted residual blocks, one of them with a shortcut."""
    from torchvision.models import MobileNetV2

    return MobileNetV2(num_classes, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]])


class TwoHeads(nn.Module):
    """The mean of two classifiers, as DeiT with a distillation token."""

    def __init__(self, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_channels, 6, 3, 2, 1), nn.ReLU(), nn.Flatten())
        width = 6 * -(-image_size[0] // 2) * -(-image_size[1] // 2)
        self.head, self.head_dist = nn.Linear(width, num_classes), nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        return (self.head(features) + self.head_dist(features)) / 2  # type: ignore[no-any-return]
