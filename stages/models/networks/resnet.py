"""Residual networks for small images: He et al. 2016, "Deep Residual Learning", section 4.2, and the wide "x4" ones."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from kdpipe.stages.models.networks.init import he_initialize

NARROW = (16, 16, 32, 64)
TIMES_4 = (32, 64, 128, 256)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut: [B, C_in, H, W] -> [B, C_out, H / stride, W / stride], after the ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + shortcut)  # type: ignore[no-any-return]


def resnet(depth: int, widths: tuple[int, int, int, int], /, *, num_classes: int, in_channels: int) -> nn.Sequential:
    """Build a residual network of `depth` = 6n + 2 layers: images [B, in_channels, H, W] -> logits [B, num_classes].

    `widths` are the channels of the stem and of the three stages. `layer1` [B, widths[1], H, W], `layer2`
    [B, widths[2], H/2, W/2] and `layer3` [B, widths[3], H/4, W/4] give their last block's output *after* its ReLU, as
    in RepDistiller and mdistiller.
    """
    blocks = (depth - 2) // 6
    stem, *stages = widths
    model = nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(in_channels, stem, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(stem),
            relu=nn.ReLU(),
            layer1=_stage(stem, stages[0], blocks, stride=1),
            layer2=_stage(stages[0], stages[1], blocks, stride=2),
            layer3=_stage(stages[1], stages[2], blocks, stride=2),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(stages[2], num_classes),
        )
    )
    he_initialize(model)
    return model


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))
