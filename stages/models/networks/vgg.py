"""VGG with batch norm for small images: Simonyan and Zisserman 2015, its fully connected layers left out."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from kdpipe.stages.models.networks.init import he_initialize

WIDTHS = (64, 128, 256, 512, 512)


def vgg(
    convs: tuple[int, int, int, int, int],
    /,
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
) -> nn.Sequential:
    """Build VGG with `convs` convolutions in its five blocks: images [B, in_channels, H, W] -> logits [B, num_classes].

    `block0` [B, 64, H, W], `block1` [B, 128, H/2, W/2], `block2` [B, 256, H/4, W/4], `block3` and `block4`
    [B, 512, H/8, W/8] give maps *after* the ReLU and before the pool. As in RepDistiller and mdistiller, images of 64
    pixels or more are pooled once more, between `block3` and `block4`, and the last map is averaged to one pixel.
    """
    num_pools = 4 if min(image_size) >= 64 else 3
    layers = OrderedDict[str, nn.Module]()
    channels = in_channels
    for index, (width, num_convs) in enumerate(zip(WIDTHS, convs, strict=True)):
        layers[f"block{index}"] = _block(channels, width, num_convs)
        if index < num_pools:
            layers[f"pool{index}"] = nn.MaxPool2d(2)
        channels = width
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["classifier"] = nn.Linear(channels, num_classes)
    model = nn.Sequential(layers)
    he_initialize(model, linear_std=0.01)
    return model


def _block(in_channels: int, out_channels: int, num_convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(num_convs):
        conv = nn.Conv2d(out_channels if index else in_channels, out_channels, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)
