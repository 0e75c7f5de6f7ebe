"""Pruning of single weights: the smallest become zero, and a network keeps its shape.

Unstructured, a kernel gains nothing from it until most weights are gone; 2 of every 4 in a row is what the sparse
tensor cores of NVIDIA GPUs run (Mishra et al. 2021, arXiv:2104.08378).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stages.compression.rank import least_of_all
from stages.errors import ModelError


def sparable_layers(
    model: nn.Module, outputs: Sequence[nn.Module], kept: Sequence[nn.Module], *, runs_of_4: bool
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The Conv2d and Linear layers that may lose weights, by path, and why each of the others may not.

    Spared are the layers in `outputs` (they write the logits), what is in `kept` modules, depthwise convolutions, and,
    for `runs_of_4`, layers whose input channels do not come in fours.
    """
    named = {id(layer) for module in kept for layer in module.modules()}
    taken: dict[str, nn.Module] = {}
    spared: dict[str, str] = {}
    for path, layer in _weight_layers(model).items():
        inputs = layer.get_parameter("weight").shape[1]
        if any(layer is output for output in outputs):
            spared[path] = "it writes the logits"
        elif id(layer) in named:
            spared[path] = "named in prune.keep"
        elif isinstance(layer, nn.Conv2d) and inputs == 1 and layer.groups > 1:
            spared[path] = "a depthwise convolution"
        elif runs_of_4 and inputs % 4:
            spared[path] = f"it reads {inputs} channels, no multiple of 4"
        else:
            taken[path] = layer
    return taken, spared


@torch.no_grad()
def zero_smallest(layers: Mapping[str, nn.Module], share: float, *, together: bool, max_share: float) -> None:
    """Zero the `share` of the weights that is smallest in magnitude, biases aside; what is zero already goes first.

    `together` ranks the weights of all layers in one list (global magnitude), of which no layer gives up more than
    `max_share`, nor its last weight; otherwise every layer gives up its `share`. Raises ModelError where `max_share`
    forbids the goal.
    """
    weights = [layer.get_parameter("weight") for layer in layers.values()]
    if not together:
        for weight in weights:
            _zero_first(weight, weight.abs().flatten().argsort(stable=True), round(share * weight.numel()))
        return
    sizes = _sizes_by_rank(weights, share, max_share)
    for weight, num_zeroed in zip(weights, sizes, strict=True):
        _zero_first(weight, weight.abs().flatten().argsort(stable=True), num_zeroed)


@torch.no_grad()
def zero_two_of_four(layers: Mapping[str, nn.Module]) -> None:
    """In each run of 4 input channels of every layer, at each place of the kernel, zero the 2 smallest weights."""
    for layer in layers.values():
        weight = layer.get_parameter("weight")
        runs = weight.movedim(1, -1)  # [out, ..., in]
        runs = runs.reshape(*runs.shape[:-1], -1, 4)
        least = runs.abs().argsort(dim=-1, stable=True)[..., :2]
        weight.copy_(runs.scatter(-1, least, 0.0).flatten(-2).movedim(-1, 1))


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Which weights stay, by parameter name: true where a weight is not zero, in the weight's shape, on its device.

    Only Conv2d and Linear weights (of subclasses too) that hold a zero, but not zeros alone, have a mask. A float that
    training left at exactly 0 is next to impossible, so a zero was put there; and pruning empties no layer, so one full
    of zeros was started like that and must be free to learn. Call it before training, not amid it.
    """
    masks = {}
    for path, layer in _weight_layers(model).items():
        mask = layer.get_parameter("weight").detach() != 0
        if bool(mask.any()) and not bool(mask.all()):
            masks[f"{path}.weight" if path else "weight"] = mask
    return masks


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero again, in place, what `masks` zero: for after every step of the optimizer. Masks lie on the model's device.

    Raises ModelError if the model lacks a parameter that has a mask.
    """
    for path, mask in masks.items():
        try:
            weight = model.get_parameter(path)
        except AttributeError as fault:
            raise ModelError(f"there is a mask for {path!r}, which is no parameter of this model.") from fault
        weight.mul_(mask)


def _weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}


def _zero_first(weight: Tensor, order: Tensor, num_zeroed: int) -> None:
    keep = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    keep[order[: min(num_zeroed, weight.numel() - 1)]] = False
    weight.mul_(keep.view(weight.shape))


def _sizes_by_rank(weights: Sequence[Tensor], share: float, max_share: float) -> list[int]:
    """How many weights of each layer are among the smallest of all."""
    scores = [weight.abs().flatten().float().cpu() for weight in weights]
    num_safe = [max(1, math.ceil(round(len(score) * (1 - max_share), 6))) for score in scores]
    gone = least_of_all(scores, num_safe, round(share * sum(map(len, scores))))
    if gone is None:
        raise ModelError(
            f"zeroing {share:.0%} of all weights is impossible while prune.max_ratio lets no layer lose more than "
            f"{max_share:.0%}: lower prune.ratio, or raise prune.max_ratio."
        )
    return gone
