"""Parameter groups: weight decay that leaves norms and biases alone, and layer-wise decay of the learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from kdpipe.stages.training.optimization.timm_glue import import_timm

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

    The layers are timm's if the model groups its parameters as timm's models do, else those of `layers_of`.
    """
    named = dict(model.named_parameters())
    if hasattr(model, "group_matcher"):
        group = import_timm("models", "layer_decay of a model of timm").group_parameters
        found: dict[str, int] = group(model, model.group_matcher(coarse=False), reverse=True)
        depths = {id(named[name]): depth for name, depth in found.items()}
    else:
        layers = list(layers_of(model, sum(one.numel() for one in named.values())))
        depths = {}
        depth = -1
        for layer in layers:  # norms and biases alone belong to the layer before them
            depth += depth < 0 or any(one.ndim > 1 for one in layer.parameters())
            depths |= {id(one): depth for one in layer.parameters() if id(one) not in depths}
    last = max(depths.values(), default=0)
    return {id(one): decay ** (last - depths.get(id(one), 0)) for one in named.values()}


def layers_of(module: nn.Module, num_parameters: int) -> Iterator[nn.Module]:
    """Yield the layers of a network, in the order of their definition.

    Lists and sequences are divided, and so is a module with more than half of the network's parameters: the layers of a
    ResNet are its blocks. A parameter outside of all layers, such as a class token, belongs to the first one.
    """
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    size = sum(one.numel() for one in module.parameters())
    if children and (type(module) in (nn.Sequential, nn.ModuleList) or 2 * size > num_parameters):
        for child in children:
            yield from layers_of(child, num_parameters)
    else:
        yield module
