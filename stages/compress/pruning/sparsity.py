"""Unstructured pruning: the smallest weights become zero, and the network keeps its shape.

A kernel gains nothing from it until most weights are zero; 2 of every 4 in a row is what the sparse tensor cores of
NVIDIA GPUs run (Mishra et al. 2021, arXiv:2104.08378).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdpipe.stages.compress.pruning.importance import global_lowest
from kdpipe.stages.errors import ModelError


def prunable_layers(
    model: nn.Module, outputs: Sequence[nn.Module], exclude: Sequence[nn.Module], *, is_2_4: bool
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the Conv2d and Linear layers that may lose weights, by path, and why each of the others may not.

    Excluded are the layers in `outputs` (they write the logits), those in the modules `exclude`, depthwise
    convolutions, those whose weight is computed from others, and, for `is_2_4`, layers whose input channels are not a
    multiple of 4.
    """
    named = {id(layer) for module in exclude for layer in module.modules()}
    prunable: dict[str, nn.Module] = {}
    reasons: dict[str, str] = {}
    for path, layer in _weight_layers(model).items():
        if not has_own_weight(layer):
            reasons[path] = "its weight is computed (weight or spectral norm)"
            continue
        inputs = layer.get_parameter("weight").shape[1]
        if any(layer is output for output in outputs):
            reasons[path] = "it writes the logits"
        elif id(layer) in named:
            reasons[path] = "named in prune.exclude"
        elif isinstance(layer, nn.Conv2d) and inputs == 1 and layer.groups > 1:
            reasons[path] = "a depthwise convolution"
        elif is_2_4 and inputs % 4:
            reasons[path] = f"it reads {inputs} channels, no multiple of 4"
        else:
            prunable[path] = layer
    return prunable, reasons


@torch.no_grad()
def prune_smallest(layers: Mapping[str, nn.Module], share: float, *, together: bool, max_share: float) -> None:
    """Zero the `share` of the weights smallest in magnitude, biases aside; existing zeros come first.

    Either every layer loses its `share`, or the weights of all layers are ranked `together`; then no layer loses more
    than `max_share`, nor its last weight.

    Raises:
        ModelError: If `max_share` makes the goal impossible.
    """
    weights = [layer.get_parameter("weight") for layer in layers.values()]
    counts = [round(share * weight.numel()) for weight in weights]
    if together:
        counts = _num_zeroed_by_rank(weights, share, max_share)
    for weight, count in zip(weights, counts, strict=True):
        lowest = weight.abs().flatten().argsort(stable=True)[: min(count, weight.numel() - 1)]
        keep = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
        keep[lowest] = False
        weight.mul_(keep.view(weight.shape))


@torch.no_grad()
def prune_2_4(layers: Mapping[str, nn.Module]) -> None:
    """Zero the 2 smallest of every 4 consecutive input-channel weights, at each position of the kernel."""
    for layer in layers.values():
        weight = layer.get_parameter("weight")
        runs = weight.movedim(1, -1)  # [out, ..., in]
        runs = runs.reshape(*runs.shape[:-1], -1, 4)
        lowest = runs.abs().argsort(dim=-1, stable=True)[..., :2]
        weight.copy_(runs.scatter(-1, lowest, 0.0).flatten(-2).movedim(-1, 1))


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return which weights stay, by parameter name: true where a weight is not zero, on its device.

    Only Conv2d and Linear weights (of subclasses too) that have zeros, but not only zeros, have a mask. Training almost
    never produces an exact 0, so zeros come from pruning; and pruning empties no layer, so one full of zeros was
    initialized that way and must be free to learn. Call it before training, not during it.
    """
    masks = {}
    for path, layer in _weight_layers(model).items():
        if not has_own_weight(layer):
            continue
        mask = layer.get_parameter("weight").detach() != 0
        if bool(mask.any()) and not bool(mask.all()):
            masks[f"{path}.weight" if path else "weight"] = mask
    return masks


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero again, in place, what `masks` zero: for after every optimizer step. Masks are on the model's device."""
    for path, mask in masks.items():
        model.get_parameter(path).mul_(mask)


def require_own_weights(model: nn.Module) -> None:
    """Raise ModelError for a layer whose weight is computed from others: its channels cannot be followed."""
    if computed := [path for path, layer in _weight_layers(model).items() if not has_own_weight(layer)]:
        raise ModelError(
            f"the channels of this model cannot be pruned: the weight of {computed[0]} is computed (weight or spectral "
            "norm). Set prune.kind = 'weights', or compress.steps = ['quantize']."
        )


def has_own_weight(layer: nn.Module) -> bool:
    """Return whether the weight of a layer is a parameter, not computed in each forward pass."""
    return layer._parameters.get("weight") is not None


def _weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}


def _num_zeroed_by_rank(weights: Sequence[Tensor], share: float, max_share: float) -> list[int]:
    """Return how many weights of each layer are among the smallest of all."""
    scores = [weight.abs().flatten().float().cpu() for weight in weights]
    num_safe = [max(1, math.ceil(round(len(score) * (1 - max_share), 6))) for score in scores]
    removed = global_lowest(scores, num_safe, round(share * sum(map(len, scores))))
    if removed is None:
        raise ModelError(
            f"zeroing {share:.0%} of all weights is impossible while prune.max_ratio lets no layer lose more than "
            f"{max_share:.0%}: lower prune.ratio, or raise prune.max_ratio."
        )
    return removed
