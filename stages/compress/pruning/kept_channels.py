"""Which channels of a layer's output a pruned network kept, for the adapters of losses that read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdpipe.stages.distillation.adapters import KeptChannels
from kdpipe.stages.models.clone import preserve_modes
from kdpipe.stages.models.hooks import capture, extract_features, nearest


def kept_channels(
    model: nn.Module, example: Tensor, layers: Iterable[str], removed: Mapping[str, Sequence[int]]
) -> dict[str, KeptChannels]:
    """Return the kept output channels of those `layers` that lost some.

    A layer's channels are those of the modules that write its output: the first ones on the way back from it, of as
    many channels. A layer is left out if there is none, as with concatenated maps.

    Args:
        model: The network before it was pruned.
        example: Images [B, C, H, W], of which only the shape counts.
        layers: Module paths.
        removed: The output channels that modules lost, by path.
    """
    paths = {model.get_submodule(path): path for path in removed}
    found = {}
    with preserve_modes(model), torch.enable_grad(), capture(paths, lambda output: output.grad_fn) as operations:
        model.eval()
        with extract_features(model, layers) as extractor:
            features = extractor(example.clone().requires_grad_()).features
    writers = {operation: paths[module] for module, calls in operations.items() for operation in calls}
    for layer, feature in features.items():
        for path in nearest(feature.grad_fn, writers):
            width, lost = feature.shape[1], set(removed[path])
            if width == _width(model.get_submodule(path)):
                found[layer] = KeptChannels(width, [index for index in range(width) if index not in lost])
                break
    return found


def _width(module: nn.Module) -> int | None:
    names = ("out_channels", "out_features", "num_features", "num_channels")
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)
