"""Two layers of low rank in place of a convolution or linear layer.

A layer y = W x + b, with W [out, in * kernel], becomes U (V x) + c: V is a layer like it with `rank` outputs, and U a
1 x 1 convolution, or a linear layer. U spans the principal components of the layer's own outputs on a few batches, as
the linear case of Zhang et al. 2016 (arXiv:1505.06798): no other layers of this rank leave a lower squared error of
these outputs. Where none were seen, it is the truncated SVD of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.clone import clone_without_hooks

Dense = nn.Conv2d | nn.Linear


class LowRank(nn.Sequential):
    """The two layers in place of one: the first has `rank` outputs."""

    @property
    def pair(self) -> tuple[Dense, Dense]:
        first, second = self
        assert isinstance(first, Dense) and isinstance(second, Dense)
        return first, second

    @property
    def rank(self) -> int:
        return len(self.pair[0].weight)


def set_ranks(model: nn.Module, ranks: Any) -> nn.Module:
    """Replace layers of `model`, factored ones too, by two of the recorded ranks each, in place, and return it.

    Their weights are zero, and the state_dict loaded next sets them.

    Raises:
        ModelError: If the record does not fit the architecture; nothing is changed then.
    """
    if not isinstance(ranks, Mapping):
        raise ModelError(f"the record of ranks is a {type(ranks).__name__}, not a table of layers.")
    found = {}
    for path, rank in ranks.items():
        try:
            layer = model.get_submodule(str(path))
        except AttributeError:
            layer = model
        layer = dense(layer) if isinstance(layer, LowRank) else layer
        if layer is model or not is_dense(layer):
            raise ModelError(f"the record of ranks is of another architecture: {str(path)!r} is no layer to factor.")
        if type(rank) is not int or not 1 <= rank <= highest_rank(layer):
            raise ModelError(
                f"the record of ranks gives {path!r} the rank {str(rank)[:40]}; expected a whole number, at least 1 "
                f"and at most {highest_rank(layer)}, above which two layers are larger than one."
            )
        found[path] = untrained(layer, rank)
    for path, layers in found.items():
        model.set_submodule(path, layers)
    return model


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Return the ranks of the factored layers, by path, in module order."""
    return {path: module.rank for path, module in model.named_modules() if isinstance(module, LowRank)}


@torch.no_grad()
def factored(layer: Dense, rank: int, basis: Tensor, mean: Tensor | None = None) -> LowRank:
    """Return the two layers of a rank whose outputs are those of `layer`, projected on the first `rank` of a basis.

    Args:
        layer: The layer, of one group.
        rank: Of the two layers.
        basis: Orthonormal columns [out, out].
        mean: The mean [out] of the layer's outputs, around which they are projected; only for a layer with a bias.
    """
    layers = untrained(layer, rank)
    up = basis[:, :rank].to(layer.weight.device)  # [out, rank]
    down = up.T @ layer.weight.detach().double().flatten(1)  # [rank, in * kernel]
    # Both layers get the same norm in each component, for the optimizer and for INT8's one scale of activations.
    scale = down.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    first, second = layers.pair
    first.weight.copy_((down / scale[:, None]).view_as(first.weight))
    second.weight.copy_((up * scale).view_as(second.weight))
    if layer.bias is not None and second.bias is not None:
        bias = layer.bias.detach().double()
        center = bias if mean is None else mean.to(bias)
        second.bias.copy_(center + up @ (up.T @ (bias - center)))
    return layers.train(layer.training)


@torch.no_grad()
def dense(layers: LowRank) -> Dense:
    """Return one layer that computes what two of low rank do."""
    first, second = layers.pair
    merged = clone_without_hooks(first)
    assert isinstance(merged, Dense)
    product = second.weight.double().flatten(1) @ first.weight.double().flatten(1)
    weight = product.view(-1, *first.weight.shape[1:]).to(first.weight)
    merged.weight = nn.Parameter(weight, first.weight.requires_grad)
    merged.bias = None if second.bias is None else nn.Parameter(second.bias.detach().clone())
    if isinstance(merged, nn.Conv2d):
        merged.out_channels = len(weight)
    else:
        merged.out_features = len(weight)
    return merged.train(layers.training)


def matrix_shape(layer: Dense) -> tuple[int, int]:
    """Return the rows and columns of a layer's weight as a matrix [out, in * kernel]."""
    return len(layer.weight), layer.weight[0].numel()


def highest_rank(layer: Dense) -> int:
    """Return the highest rank at which two layers have fewer weights than one."""
    rows, columns = matrix_shape(layer)
    return (rows * columns - 1) // (rows + columns)


def is_dense(layer: nn.Module) -> TypeGuard[Dense]:
    return type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1)


def untrained(layer: Dense, rank: int) -> LowRank:
    """Return two layers of zeros in place of one, of its device and data type."""
    has_bias, out = layer.bias is not None, len(layer.weight)
    with torch.device("meta"):  # draws no random numbers
        if isinstance(layer, nn.Conv2d):
            layers = LowRank(
                nn.Conv2d(
                    layer.in_channels,
                    rank,
                    layer.kernel_size,  # type: ignore[arg-type]
                    layer.stride,  # type: ignore[arg-type]
                    layer.padding,  # type: ignore[arg-type]
                    layer.dilation,  # type: ignore[arg-type]
                    bias=False,
                    padding_mode=layer.padding_mode,
                ),
                nn.Conv2d(rank, out, 1, bias=has_bias),
            )
        else:
            layers = LowRank(nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, out, bias=has_bias))
    layers.to(layer.weight.dtype).to_empty(device=layer.weight.device)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.zero_().requires_grad_(layer.weight.requires_grad)
    return layers
