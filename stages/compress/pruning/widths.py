"""Record a network's layer widths as JSON, to rebuild a pruned network from its architecture.

widths = record_widths(pruned)                          # stored with the weights
model = apply_widths(build_unpruned_model(), widths)    # in another process
model.load_state_dict(weights)                          # strict
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kdpipe.stages.compress.pruning.heads import find_heads
from kdpipe.stages.errors import ModelError

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
"""The sizes that pruning changes, by layer type."""

CHANNELS = "channels"
"""The size of a parameter outside such layers, as position embeddings and layer scales are, along its channels."""


def record_widths(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the sizes of every layer by module path, and of every other parameter by its own, as plain JSON.

    For example, {"fc": {"in_features": 24, "out_features": 10}, "pos_embed": {"channels": 192}, ...}.
    """
    sized: dict[str, nn.Module | nn.Parameter] = {**_layers(model), **_other_parameters(model)}
    return {path: _sizes_of(own) for path, own in sized.items()}


def apply_widths(model: nn.Module, widths: Mapping[str, Any]) -> nn.Module:
    """Cut the layers of a freshly built, unpruned `model` down to recorded `widths`, in place, and return it.

    The state_dict loaded next determines which channels these are; until then they are the first ones. Attentions get
    as many heads as their projections have. Parameters outside of layers may be missing: they stay whole.

    Raises:
        ModelError: Before anything is changed, if the record does not fit the architecture: other modules, no whole
            numbers, or sizes beyond the unpruned ones (so a hostile record cannot demand memory); later, if it
            has parts of heads.
    """
    layers, parameters = _layers(model), _other_parameters(model)
    if not isinstance(widths, Mapping):
        raise ModelError(f"the record of widths is a {type(widths).__name__}, not a table of layers.")
    parameters = {path: parameter for path, parameter in parameters.items() if path in widths}
    if different := sorted(str(path) for path in {*widths} ^ {*layers, *parameters}):
        raise ModelError(f"the record of widths is of another architecture: only one has the layer {different[0]!r}.")
    sized: dict[str, nn.Module | nn.Parameter] = {**layers, **parameters}
    for path, own in sized.items():
        _check_sizes(path, _sizes_of(own), widths[path])
    attentions = set(find_heads(model).values())
    for path, layer in layers.items():
        _resize(layer, widths[path])
    for path, parameter in parameters.items():
        prefix, _, name = path.rpartition(".")
        owner = model.get_submodule(prefix)
        cut = parameter.detach().narrow(channel_axis(parameter), 0, widths[path][CHANNELS]).clone()
        setattr(owner, name, nn.Parameter(cut, parameter.requires_grad))
        if isinstance(owner, nn.Embedding):
            owner.embedding_dim = widths[path][CHANNELS]
    for heads in attentions:
        heads.fit()
    return model


def has_sizes(module: object) -> bool:
    """Return whether a record of widths covers this module, so that it can be pruned."""
    return isinstance(module, tuple(SIZES))


def channel_axis(parameter: Tensor) -> int:
    """Return the axis of a parameter's channels, the last one of more than one entry, as torch-pruning takes it."""
    return max((axis for axis, size in enumerate(parameter.shape) if size > 1), default=0)


def _other_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters outside of layers with sizes, by path."""
    layers = _layers(model)
    return {
        path: parameter
        for path, parameter in model.named_parameters()
        if path.rpartition(".")[0] not in layers and parameter.dim()
    }


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if has_sizes(module)}


def _sizes_of(layer: nn.Module | nn.Parameter) -> dict[str, Any]:
    if isinstance(layer, nn.Parameter):
        return {CHANNELS: layer.shape[channel_axis(layer)]}
    names = next(names for kind, names in SIZES.items() if isinstance(layer, kind))
    return {name: _as_json(getattr(layer, name)) for name in names}


def _as_json(size: Any) -> Any:
    return list(size) if isinstance(size, tuple) else size


def _check_sizes(path: str, full: dict[str, Any], found: Any) -> None:
    """Raise ModelError unless `found` has exactly the keys of `full`, with whole numbers from 1 up to its own."""
    if not isinstance(found, Mapping) or set(found) != set(full):
        raise ModelError(f"the record of widths must give {', '.join(full)} of {path!r}, and nothing else.")
    for name, size in full.items():
        limits = size if isinstance(size, list) else [size]
        values = found[name] if isinstance(size, list) else [found[name]]
        fits = isinstance(values, list) and len(values) == len(limits)
        if not fits or not all(
            type(value) is int and 1 <= value <= most for value, most in zip(values, limits, strict=True)
        ):
            raise ModelError(
                f"the record of widths gives {path!r} {name} = {str(found[name])[:40]}; expected whole numbers, "
                f"at least 1 and at most {size}."
            )
    groups = found.get("groups", found.get("num_groups", 1))
    if any(found.get(name, groups) % groups for name in ("in_channels", "out_channels", "num_channels")):
        raise ModelError(f"the record of widths splits the channels of {path!r} into {groups} unequal groups.")


def _resize(layer: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Set the sizes and cut each parameter and buffer accordingly."""
    for name, size in sizes.items():
        setattr(layer, name, tuple(size) if isinstance(size, list) else size)
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        if tensor.dim() == 0:  # a counter of batches
            continue
        cut = tensor.detach()[tuple(slice(0, length) for length in _leading_shape(layer, name))].clone()
        setattr(layer, name, nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut)


def _leading_shape(layer: nn.Module, name: str) -> tuple[int, ...]:
    """Return the lengths of the leading axes of a layer's tensor, which depend on its sizes."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return (layer.out_channels, layer.in_channels // layer.groups) if name == "weight" else (layer.out_channels,)
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features) if name == "weight" else (layer.out_features,)
    if isinstance(layer, nn.LayerNorm):
        return tuple(layer.normalized_shape)
    return (next(iter(_sizes_of(layer).values())),)
