"""A multilayer perceptron, the network of the first distillation experiment (Hinton et al. 2015, section 3)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.arguments import at_least_one


def mlp(*, num_classes: int, in_channels: int, image_size: tuple[int, int], hidden: Any = (64,)) -> nn.Sequential:
    """Build fully connected layers on flattened images: [B, in_channels, H, W] -> logits [B, num_classes].

    `layer1` gives [B, hidden[0]], `layer2` [B, hidden[1]] and so on, *after* the ReLU; an empty `hidden` is softmax
    regression. Raises ModelError unless `hidden` is a list of widths.
    """
    if not isinstance(hidden, list | tuple):
        raise ModelError(f"mlp: args.hidden must be a list of widths such as [64], found {hidden!r}.")
    height, width = image_size
    layers = OrderedDict[str, nn.Module](flatten=nn.Flatten())
    features = in_channels * height * width
    for index, entry in enumerate(hidden):
        units = at_least_one("mlp", f"hidden[{index}]", entry)
        layers[f"layer{index + 1}"] = nn.Sequential(nn.Linear(features, units), nn.ReLU())
        features = units
    layers["fc"] = nn.Linear(features, num_classes)
    return nn.Sequential(layers)
