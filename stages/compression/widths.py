"""The widths of a network's layers, as JSON: with them, a pruned network is built again from its architecture alone.

widths = record_widths(pruned)                          # beside the weights
model = apply_widths(build_unpruned_model(), widths)    # in another process, years later
model.load_state_dict(weights)                          # strict
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from stages.errors import ModelError

# The sizes that pruning changes, by layer type, and how a parameter or buffer of the layer depends on them.
SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv1d: ("in_channels", "out_channels", "groups"),
    nn.Conv2d: ("in_channels", "out_channels", "groups"),
    nn.Conv3d: ("in_channels", "out_channels", "groups"),
    nn.Linear: ("in_features", "out_features"),
    nn.BatchNorm1d: ("num_features",),
    nn.BatchNorm2d: ("num_features",),
    nn.BatchNorm3d: ("num_features",),
    nn.GroupNorm: ("num_channels", "num_groups"),
    nn.LayerNorm: ("normalized_shape",),
    nn.PReLU: ("num_parameters",),
}


def record_widths(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The sizes of every layer by module path: {"fc": {"in_features": 24, "out_features": 10}, ...}; plain JSON."""
    return {path: _sizes_of(layer) for path, layer in _layers(model).items()}


def apply_widths(model: nn.Module, widths: Mapping[str, Any]) -> nn.Module:
    """Cut the layers of a freshly built, unpruned `model` down to recorded `widths`, in place, and return it.

    Which channels are left is told by the state_dict that is loaded next; until then they are the first ones. Raises
    ModelError, before anything is changed, if the record does not fit the architecture: other modules, no whole
    numbers, or sizes beyond the unpruned ones (so a hostile record cannot ask for memory).
    """
    layers = _layers(model)
    _check_paths(widths, layers)
    for path, layer in layers.items():
        _check_sizes(path, _sizes_of(layer), widths[path])
    for path, layer in layers.items():
        _resize(layer, widths[path])
    return model


def has_sizes(module: object) -> bool:
    """Whether a record of widths covers this module, so that it can be pruned."""
    return isinstance(module, tuple(SIZES))


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if has_sizes(module)}


def _sizes_of(layer: nn.Module) -> dict[str, Any]:
    names = next(names for kind, names in SIZES.items() if isinstance(layer, kind))
    return {name: _plain(getattr(layer, name)) for name in names}


def _plain(size: Any) -> Any:
    return list(size) if isinstance(size, tuple) else size


def _check_paths(widths: Any, layers: Mapping[str, nn.Module]) -> None:
    if not isinstance(widths, Mapping):
        raise ModelError(f"the record of widths is a {type(widths).__name__}, not a table of layers.")
    for path in widths:
        if path not in layers:
            nearest = difflib.get_close_matches(str(path), layers, n=1)
            hint = f"; the nearest one is {nearest[0]!r}" if nearest else ""
            raise ModelError(
                f"the record of widths names {str(path)[:80]!r}, which is no layer of this architecture{hint}."
            )
    for path in layers:
        if path not in widths:
            raise ModelError(f"the record of widths lacks the layer {path!r}: it belongs to another architecture.")


def _check_sizes(path: str, full: dict[str, Any], found: Any) -> None:
    """ModelError unless `found` has the very keys of `full`, with whole numbers from 1 up to the ones there."""
    if not isinstance(found, Mapping) or set(found) != set(full):
        raise ModelError(f"the record of widths must give {', '.join(full)} of {path!r}, and nothing else.")
    for name, size in full.items():
        limits = size if isinstance(size, list) else [size]
        values = found[name] if isinstance(size, list) else [found[name]]
        fits = isinstance(values, list) and len(values) == len(limits)
        if not fits or not all(type(one) is int and 1 <= one <= most for one, most in zip(values, limits, strict=True)):
            raise ModelError(
                f"the record of widths gives {path!r} {name} = {str(found[name])[:40]}; wanted are whole numbers, "
                f"at least 1 and at most {size}."
            )
    groups = found.get("groups", found.get("num_groups", 1))
    if any(found.get(name, groups) % groups for name in ("in_channels", "out_channels", "num_channels")):
        raise ModelError(f"the record of widths splits the channels of {path!r} into {groups} unequal groups.")


def _resize(layer: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Set the sizes and cut each parameter and buffer to the shape that follows from them."""
    for name, size in sizes.items():
        setattr(layer, name, tuple(size) if isinstance(size, list) else size)
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        if tensor.dim() == 0:  # a counter of batches
            continue
        cut = tensor.detach()[tuple(slice(0, length) for length in _leading_shape(layer, name))].clone()
        setattr(layer, name, nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut)


def _leading_shape(layer: nn.Module, name: str) -> tuple[int, ...]:
    """The lengths of the axes of a layer's tensor that depend on its sizes: they come first."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return (layer.out_channels, layer.in_channels // layer.groups) if name == "weight" else (layer.out_channels,)
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features) if name == "weight" else (layer.out_features,)
    if isinstance(layer, nn.LayerNorm):
        return tuple(layer.normalized_shape)
    return (next(iter(_sizes_of(layer).values())),)
