"""Parameter groups: weight decay that leaves norms and biases alone, and layer-wise decay of the learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.training.optimization.timm_glue import import_timm

LISTS = (nn.Sequential, nn.ModuleList)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(
    modules: nn.ModuleDict, *, decay_norm_and_bias: bool, layer_decay: float | None
) -> list[nn.Parameter] | list[dict[str, Any]]:
    """Return the parameters of all modules, in groups if they differ.

    A group has `weight_decay` 0 if it is exempt, and `lr_scale`, the factor of its learning rate.

    Args:
        modules: The network as "student", and the losses' adapters.
        decay_norm_and_bias: Whether norms, biases and other vectors have weight decay.
        layer_decay: The factor of the rate from each layer of the student to the one before it.
    """
    if decay_norm_and_bias and layer_decay is None:
        return list(modules.parameters())
    norms = {id(one) for module in modules.modules() if isinstance(module, NORMS) for one in module.parameters(False)}
    scales = {} if layer_decay is None else layer_scales(modules["student"], layer_decay)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in modules.named_parameters():
        is_exempt = parameter.ndim <= 1 or name.endswith("bias") or id(parameter) in norms
        key = (scales.get(id(parameter), 1.0), is_exempt and not decay_norm_and_bias)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale} | ({"weight_decay": 0.0} if is_exempt else {})
        for (scale, is_exempt), parameters in groups.items()
    ]


def layer_scales(model: nn.Module, decay: float) -> dict[int, float]:
    """Return the factor of the learning rate of each parameter, by its id: decay^0 in the last layer.

    The layers are timm's if the model groups its parameters as timm's models do, else those of `layers_of`. Raises
    RecipeError if there is only one.
    """
    named = dict(model.named_parameters())
    if hasattr(model, "group_matcher"):
        group = import_timm("models", "layer_decay of a model of timm").group_parameters
        found: dict[str, int] = group(model, model.group_matcher(coarse=False), reverse=True)
        depths = {id(named[name]): depth for name, depth in found.items()}
    else:
        depths, depth = {}, -1
        for layer in layers_of(model):  # norms and biases alone belong to the layer before them
            depth += depth < 0 or any(one.ndim > 1 for one in layer.parameters())
            depths |= {id(one): depth for one in layer.parameters() if id(one) not in depths}
    last = max(depths.values(), default=0)
    if last == 0:
        raise RecipeError("train.layer_decay has no effect on a network of one layer: leave it out.")
    return {id(one): decay ** (last - depths.get(id(one), 0)) for one in named.values()}


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a network, in the order of their definition: those of a ResNet are its blocks.

    Divided are the network, sequences, lists, and modules that contain a list of blocks or only one module. A parameter
    outside of all layers, such as a class token, belongs to the first one.
    """
    for child in (one for one in model.children() if any(True for _ in one.parameters())):
        grandchildren = [one for one in child.children() if any(True for _ in one.parameters())]
        if grandchildren and (type(child) in LISTS or len(grandchildren) == 1 or _has_blocks(child)):
            yield from layers_of(child)
        else:
            yield child


def _has_blocks(module: nn.Module) -> bool:
    """Return whether there is a list of two or more blocks inside; a block has children, and is not a sequence."""
    lists = (one for one in module.modules() if type(one) in LISTS)
    return any(sum(_is_block(one) for one in found.children()) > 1 for found in lists)


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, LISTS) and any(True for _ in module.children())
