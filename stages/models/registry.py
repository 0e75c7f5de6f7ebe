"""Registry of networks for small images, under their names in CIFAR-100 distillation tables.

Parameters, maps and initial weights are those of the tables' reference code (RepDistiller, mdistiller), and
`load_weights` reads its state dicts as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.models.arguments import call_with_args
from kdpipe.stages.models.networks.cnn import cnn
from kdpipe.stages.models.networks.mlp import mlp
from kdpipe.stages.models.networks.mobilenet_v2 import mobilenet_v2
from kdpipe.stages.models.networks.resnet import NARROW, TIMES_4, resnet, resnet50_cifar
from kdpipe.stages.models.networks.shufflenet_v1 import shufflenet_v1
from kdpipe.stages.models.networks.shufflenet_v2 import shufflenet_v2
from kdpipe.stages.models.networks.vgg import vgg
from kdpipe.stages.models.networks.wide_resnet import wide_resnet


@dataclass(frozen=True)
class SmallImageNetwork:
    """A builder, called by keyword, and the smallest image side that its strides leave one pixel of."""

    build: Callable[..., nn.Module]
    min_side: int = 1


SMALL_IMAGE_NETWORKS: Mapping[str, SmallImageNetwork] = {
    **{
        f"resnet{depth}": SmallImageNetwork(partial(resnet, depth, NARROW), min_side=4)
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    **{f"resnet{depth}x4": SmallImageNetwork(partial(resnet, depth, TIMES_4), min_side=4) for depth in (8, 32)},
    "resnet50_cifar": SmallImageNetwork(resnet50_cifar, min_side=8),
    **{
        f"wrn_{depth}_{widen}": SmallImageNetwork(partial(wide_resnet, depth, widen), min_side=4)
        for depth in (16, 40)
        for widen in (1, 2)
    },
    **{
        f"vgg{sum(convs) + 3}": SmallImageNetwork(partial(vgg, convs), min_side=8)
        for convs in ((1, 1, 1, 1, 1), (1, 1, 2, 2, 2), (2, 2, 2, 2, 2), (2, 2, 3, 3, 3), (2, 2, 4, 4, 4))
    },
    "mobilenet_v2": SmallImageNetwork(mobilenet_v2, min_side=16),
    "shufflenet_v1": SmallImageNetwork(shufflenet_v1, min_side=8),
    "shufflenet_v2": SmallImageNetwork(shufflenet_v2, min_side=8),
    "cnn": SmallImageNetwork(partial(cnn, False)),
    "cnn_average": SmallImageNetwork(partial(cnn, True)),
    "mlp": SmallImageNetwork(mlp),
}


def build_small_image_network(
    name: str, args: Mapping[str, Any], *, num_classes: int, in_channels: int, image_size: tuple[int, int]
) -> nn.Module:
    """Build the network called `name` in SMALL_IMAGE_NETWORKS, initialized from torch's current generator.

    Raises ModelError for unknown arguments, or images too small for its strides.
    """
    network = SMALL_IMAGE_NETWORKS[name]
    if min(image_size) < network.min_side:
        side, (height, width) = network.min_side, image_size
        raise ModelError(f"{name} needs images of {side} x {side} or more, the data has {height} x {width}.")
    offered = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    try:
        model: nn.Module = call_with_args(name, network.build, offered, args)
    except (RuntimeError, MemoryError, OverflowError) as error:  # more weights than memory holds, or bytes can count
        raise ModelError(f"{name} cannot be built with args {dict(args)!r} ({cause(error)}).") from error
    return model
