"""The half-width MobileNetV2 of the CIFAR-100 tables: Sandler et al. 2018, with ReLU in place of ReLU6."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from kdpipe.stages.models.networks.init import he_initialize

WIDTH = 0.5
LAST_WIDTH = 1280
# expansion, output channels at full width, blocks, stride of the first one
BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """An inverted residual: [B, C_in, H, W] -> [B, C_out, H / stride, W / stride], without a ReLU at the end."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *_conv_bn_relu(in_channels, hidden, 1),
            *_conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.has_shortcut else out


def mobilenet_v2(*, num_classes: int, in_channels: int) -> nn.Sequential:
    """Build MobileNetV2 at half width: images [B, in_channels, H, W] -> logits [B, num_classes].

    `conv1` gives [B, 16, H/2, W/2] after its ReLU; `blocks.0` to `blocks.6` give linear (signed) maps, as in the
    original, of 8, 12, 16, 32, 48, 80 and 160 channels at strides 2, 2, 4, 8, 8, 16 and 16; `conv2` gives
    [B, 1280, H/16, W/16] after its ReLU.
    """
    channels = int(32 * WIDTH)
    conv1 = nn.Sequential(*_conv_bn_relu(in_channels, channels, 3, stride=2))
    blocks: list[nn.Module] = []
    for expansion, full_width, num_blocks, stride in BLOCKS:
        width = int(full_width * WIDTH)
        first = InvertedResidual(channels, width, stride, expansion)
        rest = (InvertedResidual(width, width, 1, expansion) for _ in range(num_blocks - 1))
        blocks.append(nn.Sequential(first, *rest))
        channels = width
    model = nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=conv1,
            blocks=nn.Sequential(*blocks),
            conv2=nn.Sequential(*_conv_bn_relu(channels, LAST_WIDTH, 1)),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(nn.Linear(LAST_WIDTH, num_classes)),
        )
    )
    he_initialize(model, linear_std=0.01)
    return model


def _conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, nn.Module, nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU()
