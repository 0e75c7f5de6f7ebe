"""Residual networks for small images: He et al. 2016, "Deep Residual Learning", section 4.2, and the wide "x4" ones.

And their ResNet-50 with RepDistiller's stem for small images: a 3x3 convolution without stride, and no pool.
"""

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


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions: [B, C_in, H, W] -> [B, 4 width, H / stride, W / stride], after the ReLU."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu3 = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        return self.relu3(self.bn3(self.conv3(out)) + self.shortcut(x))  # type: ignore[no-any-return]


def resnet50_cifar(*, num_classes: int, in_channels: int) -> nn.Sequential:
    """Build ResNet-50 for small images: [B, in_channels, H, W] -> logits [B, num_classes].

    `layer1` [B, 256, H, W], `layer2` [B, 512, H/2, W/2], `layer3` [B, 1024, H/4, W/4] and `layer4` [B, 2048, H/8, W/8]
    give their last block's output *after* its ReLU, as in RepDistiller.
    """
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(in_channels, 64, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(64), relu=nn.ReLU()
    )
    channels = 64
    for number, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        first = Bottleneck(channels, width, 1 if number == 1 else 2)
        channels = 4 * width
        layers[f"layer{number}"] = nn.Sequential(first, *(Bottleneck(channels, width, 1) for _ in range(blocks - 1)))
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(channels, num_classes)}
    model = nn.Sequential(layers)
    he_initialize(model)
    return model
