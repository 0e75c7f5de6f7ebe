"""ShuffleNetV2 1x of the CIFAR-100 tables: Ma et al. 2018, for images of about 32x32."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

STEM = 24
STAGES = ((116, 3), (232, 7), (464, 3))  # output channels, units that keep the size
LAST_WIDTH = 1024


class KeepUnit(nn.Module):
    """A unit that filters half of the channels and shuffles all: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        passed, filtered = x.chunk(2, 1)
        filtered = self.relu1(self.bn1(self.conv1(filtered)))
        filtered = self.bn2(self.conv2(filtered))
        filtered = self.relu3(self.bn3(self.conv3(filtered)))
        return self.shuffle(torch.cat([passed, filtered], 1))  # type: ignore[no-any-return]


class DownUnit(nn.Module):
    """A unit of two branches that halve the map and are shuffled together: [B, C_in, H, W] -> [B, C_out, H/2, W/2]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu5 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        left = self.relu2(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.relu3(self.bn3(self.conv3(x)))
        right = self.relu5(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return self.shuffle(torch.cat([left, right], 1))  # type: ignore[no-any-return]


def shufflenet_v2(*, num_classes: int, in_channels: int) -> nn.Sequential:
    """Build ShuffleNetV2 at width 1: images [B, in_channels, H, W] -> logits [B, num_classes].

    `layer1` [B, 116, H/2, W/2], `layer2` [B, 232, H/4, W/4] and `layer3` [B, 464, H/8, W/8] give maps *after* the ReLU
    and the shuffle; `relu2` gives the last map [B, 1024, H/8, W/8]. torch-pruning cannot follow the split and the
    shuffle: this network cannot be pruned.
    """
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(in_channels, STEM, 1, bias=False), bn1=nn.BatchNorm2d(STEM), relu=nn.ReLU()
    )
    channels = STEM
    for number, (width, num_units) in enumerate(STAGES, start=1):
        rest = (KeepUnit(width) for _ in range(num_units))
        layers[f"layer{number}"] = nn.Sequential(DownUnit(channels, width), *rest)
        channels = width
    layers["conv2"] = nn.Conv2d(channels, LAST_WIDTH, 1, bias=False)
    layers["bn2"] = nn.BatchNorm2d(LAST_WIDTH)
    layers["relu2"] = nn.ReLU()
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(LAST_WIDTH, num_classes)
    return nn.Sequential(layers)
