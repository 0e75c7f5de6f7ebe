"""List the modules of a network whose outputs losses on features can take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdpipe.stages.models.clone import preserve_modes
from kdpipe.stages.models.hooks import capture, model_errors


@dataclass(frozen=True)
class ModuleOutput:
    """A module and what it returns.

    Attributes:
        path: Its path, as losses and `cache.layers` name it.
        kind: Its class.
        shape: The shape of its output in its last call, without the batch axis.
    """

    path: str
    kind: str
    shape: tuple[int, ...]


def list_modules(model: nn.Module, image_shape: tuple[int, int, int]) -> list[ModuleOutput]:
    """Return the modules that a forward pass calls and that return a tensor with a batch axis, in their order.

    Raises ModelError if the model does not run on images (C, H, W).
    """
    modules = {path: module for path, module in model.named_modules() if path}
    images = torch.zeros(2, *image_shape, device=next(model.parameters()).device)

    def shape(output: object) -> tuple[int, ...] | None:
        return tuple(output.shape[1:]) if isinstance(output, Tensor) and len(output) == len(images) else None

    with preserve_modes(model), torch.no_grad(), capture(modules.values(), shape) as shapes, model_errors(images):
        model.eval()
        model(images)
    return [
        ModuleOutput(path, type(module).__name__, found[-1])
        for path, module in modules.items()
        if (found := shapes[module]) and found[-1] is not None
    ]
