"""A plain convolutional network for the smallest images: digits of 8x8, MNIST and Fashion-MNIST of 28x28."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from stages.errors import ModelError
from stages.models.arguments import at_least_one
from stages.models.he_init import he_initialise

HEADS = ("flatten", "average")


def cnn(
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    width: int = 32,
    num_stages: int = 2,
    convs_per_stage: int = 2,
    head: str = "flatten",
) -> nn.Sequential:
    """Stages of conv-BN-ReLU, each halved by a max pool: images [B, in_channels, H, W] -> logits [B, num_classes].

    `stage1` gives [B, width, H, W], `stage2` [B, 2 width, H/2, W/2] and so on, *after* the ReLU and before the pool.
    The last map is pooled once more and flattened: in aligned images, where a thing stands says much. With
    `head = "average"` it is averaged, as in larger networks. Raises ModelError for a bad argument, or for images that
    the pools would shrink to nothing.
    """
    if head not in HEADS:
        raise ModelError(f"cnn has head = {head!r}: give one of {', '.join(HEADS)}.")
    width = at_least_one("cnn", "width", width)
    num_stages = at_least_one("cnn", "num_stages", num_stages)
    convs_per_stage = at_least_one("cnn", "convs_per_stage", convs_per_stage)
    height, wide = image_size
    if min(height, wide) < (least := 2**num_stages):
        raise ModelError(
            f"cnn with num_stages = {num_stages} needs images of {least} x {least} or more, "
            f"the data has {height} x {wide}."
        )
    layers = OrderedDict[str, nn.Module]()
    channels = in_channels
    for index in range(num_stages):
        layers[f"stage{index + 1}"] = _stage(channels, width << index, convs_per_stage)
        last = index == num_stages - 1 and head == "average"
        layers[f"pool{index + 1}"] = nn.AdaptiveAvgPool2d(1) if last else nn.MaxPool2d(2)
        channels = width << index
    layers["flatten"] = nn.Flatten()
    positions = 1 if head == "average" else (height >> num_stages) * (wide >> num_stages)
    layers["fc"] = nn.Linear(channels * positions, num_classes)
    model = nn.Sequential(layers)
    he_initialise(model)
    return model


def _stage(in_channels: int, out_channels: int, num_convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(num_convs):
        conv = nn.Conv2d(out_channels if index else in_channels, out_channels, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)
