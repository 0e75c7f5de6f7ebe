"""The head of a network: the last linear layer, whose output is what the network returns."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.hooks import feature_shapes, get_module
from kdpipe.stages.models.tokens import PRE_LOGITS, classifier_path, is_headless


@torch.no_grad()
def linear_head(model: nn.Module, image_shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Return the weights of a network's last linear layer, and its biases in the last column: float32 [C, D + 1].

    Raises:
        ModelError: There is none that takes a vector and returns the network's very logits.
    """
    if is_headless(model):
        raise ModelError("the teacher's head cannot be stored: it returns embeddings and has none.")
    path = classifier_path(model)
    layer, kind = get_module(model, path), "its last layer"
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise ModelError(f"the teacher's head cannot be stored: {kind}, {path}, is {type(layer).__name__}, not Linear.")
    try:
        shape = feature_shapes(model, [PRE_LOGITS], image_shape)[PRE_LOGITS]
    except ModelError as error:  # several heads, or what follows the layer
        raise ModelError(f"the teacher's head cannot be stored: {error}") from error
    if len(shape) != 1:
        raise ModelError(f"the teacher's head cannot be stored: {kind}, {path}, takes {list(shape)}, not a vector.")
    weight = layer.weight.detach().float().cpu()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().cpu()
    head: NDArray[np.float32] = torch.cat([weight, bias[:, None]], 1).numpy()
    return head
