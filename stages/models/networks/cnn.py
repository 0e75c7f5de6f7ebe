"""Plain convolutional networks for the smallest images: digits of 8x8, MNIST and Fashion-MNIST of 28x28."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.arguments import at_least_one
from kdpipe.stages.models.networks.init import he_initialize


def cnn(
    average: bool,
    /,
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    width: int = 32,
    num_stages: int = 2,
    convs_per_stage: int = 2,
) -> nn.Sequential:
    """Build stages of conv-BN-ReLU, each with a max pool: images [B, in_channels, H, W] -> logits [B, num_classes].

    `stage1` gives [B, width, H, W], `stage2` [B, 2 width, H/2, W/2] and so on, *after* the ReLU and before the pool.
    The last map is flattened, as position is informative in aligned images; or, with `average`, averaged as in larger
    networks, so that another network's classifier can replace this one (SimKD). Raises ModelError for a bad argument,
    or for images that the pools would shrink to nothing.
    """
    name = "cnn_average" if average else "cnn"
    width = at_least_one(name, "width", width)
    num_stages = at_least_one(name, "num_stages", num_stages)
    convs_per_stage = at_least_one(name, "convs_per_stage", convs_per_stage)
    height, wide = image_size
    if min(height, wide) < (least := 2**num_stages):
        raise ModelError(
            f"{name} with num_stages = {num_stages} needs images of {least} x {least} or more, "
            f"the data has {height} x {wide}."
        )
    layers = OrderedDict[str, nn.Module]()
    channels = in_channels
    for index in range(num_stages):
        layers[f"stage{index + 1}"] = _stage(channels, width << index, convs_per_stage)
        layers[f"pool{index + 1}"] = nn.MaxPool2d(2)
        channels = width << index
    if average:
        layers[f"pool{num_stages}"] = nn.AdaptiveAvgPool2d(1)
    num_positions = 1 if average else (height >> num_stages) * (wide >> num_stages)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels * num_positions, num_classes)
    model = nn.Sequential(layers)
    he_initialize(model)
    return model


def _stage(in_channels: int, out_channels: int, num_convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(num_convs):
        conv = nn.Conv2d(out_channels if index else in_channels, out_channels, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)
