"""Wide residual networks for small images: Zagoruyko and Komodakis 2016, "Wide Residual Networks"."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from kdpipe.stages.models.networks.init import he_initialize


class PreActBlock(nn.Module):
    """Batch norm and ReLU *before* each of two 3x3 convolutions: [B, C_in, H, W] -> [B, C_out, H / stride, W / stride].

    The output is the bare sum, before any batch norm or ReLU. Where the width changes, the shortcut starts from the
    activated input, as in the reference code.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv1(activated)
        return self.conv2(self.relu2(self.bn2(out))) + shortcut  # type: ignore[no-any-return]


def wide_resnet(depth: int, widen: int, /, *, num_classes: int, in_channels: int) -> nn.Sequential:
    """Build a wide resnet of `depth` = 6n + 4 layers: images [B, in_channels, H, W] -> logits [B, num_classes].

    `layer1` [B, 16 widen, H, W], `layer2` [B, 32 widen, H/2, W/2] and `layer3` [B, 64 widen, H/4, W/4] (`block1` to
    `block3` in the reference code) give bare sums, *before* the batch norm and ReLU that follow, as in the original;
    `relu` gives the last map activated.
    """
    blocks = (depth - 4) // 6
    stages = (16 * widen, 32 * widen, 64 * widen)
    classifier = nn.Linear(stages[2], num_classes)
    nn.init.zeros_(classifier.bias)
    model = nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
            layer1=_stage(16, stages[0], blocks, stride=1),
            layer2=_stage(stages[0], stages[1], blocks, stride=2),
            layer3=_stage(stages[1], stages[2], blocks, stride=2),
            bn1=nn.BatchNorm2d(stages[2]),
            relu=nn.ReLU(),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=classifier,
        )
    )
    he_initialize(model)
    return model


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(PreActBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))
