"""ShuffleNet (3 groups) of the CIFAR-100 tables: Zhang et al. 2018, for images of about 32x32."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

GROUPS = 3
STEM = 24
STAGES = ((240, 4), (480, 8), (960, 4))  # output channels, units


class ShuffleUnit(nn.Module):
    """Grouped 1x1, depthwise 3x3, grouped 1x1 with a shortcut: [B, C_in, H, W] -> [B, C_out, H / stride, W / stride].

    With stride 2 the averaged input is concatenated, so the branch makes C_out - C_in channels. The output is after
    the ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        branch = out_channels - in_channels if stride == 2 else out_channels
        hidden = branch // 4
        first_groups = 1 if in_channels == STEM else GROUPS  # the stem has too few channels to be split
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(first_groups) if first_groups > 1 else nn.Identity()
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(hidden, branch, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(branch)
        self.relu3 = nn.ReLU()
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.shuffle(self.relu1(self.bn1(self.conv1(x))))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        joined = out + x if self.shortcut is None else torch.cat([out, self.shortcut(x)], 1)
        return self.relu3(joined)  # type: ignore[no-any-return]


def shufflenet_v1(*, num_classes: int, in_channels: int) -> nn.Sequential:
    """Build ShuffleNet with 3 groups: images [B, in_channels, H, W] -> logits [B, num_classes].

    `layer1` [B, 240, H/2, W/2], `layer2` [B, 480, H/4, W/4] and `layer3` [B, 960, H/8, W/8] give maps *after* the ReLU.
    torch-pruning cannot follow the shuffle between grouped convolutions: this network cannot be pruned.
    """
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(in_channels, STEM, 1, bias=False), bn1=nn.BatchNorm2d(STEM), relu=nn.ReLU()
    )
    channels = STEM
    for number, (width, num_units) in enumerate(STAGES, start=1):
        rest = (ShuffleUnit(width, width, 1) for _ in range(num_units - 1))
        layers[f"layer{number}"] = nn.Sequential(ShuffleUnit(channels, width, 2), *rest)
        channels = width
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)
