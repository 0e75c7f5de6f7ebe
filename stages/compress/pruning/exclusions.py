"""Explain why a group of channels must stay whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from kdpipe.stages.compress.pruning.heads import Heads, find_heads, projections
from kdpipe.stages.compress.pruning.importance import batch_norms_of
from kdpipe.stages.compress.pruning.widths import channel_axis, has_sizes

if TYPE_CHECKING:
    import torch_pruning

BROADCASTS, COPIES = re.compile("(Add|Sub|Mul|Cat)Backward"), re.compile("(Expand|ToCopy)Backward")
"""Operations that combine the channels of a parameter with others one by one, and those that only copy it."""

WEIGHT_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class ModuleNames:
    """Names of a model's modules and parameters, and the modules that must stay whole by themselves.

    With `heads` these are not the attentions that may lose heads: those are in `heads`, by their projections.

    Attributes:
        unseen: The layers that read what the dependency graph does not show.
    """

    unseen: Sequence[nn.Module] = ()

    def __init__(
        self, model: nn.Module, outputs: Sequence[nn.Module], exclude: Sequence[nn.Module], *, heads: bool
    ) -> None:
        self.heads: dict[nn.Module, Heads] = find_heads(model) if heads else {}
        self.paths = {module: path for path, module in model.named_modules()}
        self.parameters = {id(parameter): path for path, parameter in model.named_parameters()}
        self.attention_of = {
            inner: path
            for path, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
            for inner in module.modules()
        }
        self.reasons = {layer: "named in prune.exclude" for module in exclude for layer in module.modules()}
        self.reasons |= {
            layer: f"it is part of the attention {self.paths[attention]!r}, whose heads stay"
            for attention in model.modules()
            for layer, _ in projections(attention)
            if layer not in self.heads
        }
        self.reasons |= dict.fromkeys(outputs, "it writes the logits")

    def outside(self, graph: torch_pruning.DependencyGraph) -> dict[nn.Module, str]:
        """Return the layers that a graph does not have, with the reason."""
        layers = [layer for layer in self.paths if isinstance(layer, WEIGHT_LAYERS) and layer not in graph.module2node]
        return {
            layer: f"it is part of the attention {self.attention_of[layer]!r}"
            if layer in self.attention_of
            else "the forward does not call it"
            for layer in layers
        }

    def path_of(self, member: Any) -> str:
        """Return the path of a module or parameter, by which a record of widths has it."""
        if isinstance(member, nn.Parameter):
            return self.parameters[id(member)]
        return f"{self.paths[member]}.weight" if isinstance(member, nn.Embedding) else self.paths[member]

    def describe(self, member: Any) -> str:
        """Describe a member that no record of widths covers."""
        if isinstance(member, nn.Parameter):
            return f"the parameter {self.parameters.get(id(member), '')!r}"
        if isinstance(member, nn.MultiheadAttention):
            return f"the attention {self.paths[member]!r}"
        return f"{self.paths.get(member, '')!r} ({type(member).__name__}), which cannot be cut"


def exclusion_reason(found: Any, names: ModuleNames, *, with_batch_norm: bool) -> str | None:
    """Return why a group must stay whole, or None."""
    members = [dependency.target.module for dependency, _ in found]
    for member in [*written(found, WEIGHT_LAYERS), *written(found, nn.Module)]:
        if member in names.reasons:
            return f"its channels meet those of {names.paths[member]!r}: {names.reasons[member]}"
    for dependency, indices in found:
        member = dependency.target.module
        if has_sizes(member) or _is_weightless(member):
            continue
        if names.unseen or not _is_broadcast(dependency.target, indices):
            return f"its channels reach {names.describe(member)}"
    for member in written(found, nn.Module):
        # A pass-through layer without a predecessor reads the image.
        if _passes_on(member) and not found._DG.module2node[member].inputs:
            return f"its channels are the image's, which {names.paths[member]!r} reads one by one"
    if any(_is_shuffle(found._DG.module2node[member].grad_fn) for member in members):
        return "its channels are shuffled, or split over more axes and joined again"
    if with_batch_norm and not batch_norms_of(members):
        return "no batch norm in its group"
    return None


def written(found: Any, kinds: Any) -> list[Any]:
    """Return the members of these types whose outputs, not just inputs, are in the group."""
    members = [item.target.module for item, _ in found if found._DG.is_out_channel_pruning_fn(item.handler)]
    return [member for member in members if isinstance(member, kinds)]


def is_depthwise(layer: Any) -> bool:
    return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == layer.out_channels > 1


def _passes_on(member: Any) -> bool:
    return is_depthwise(member) or (has_sizes(member) and not isinstance(member, WEIGHT_LAYERS))


def _is_shuffle(operation: Any) -> bool:
    """Return whether an autograd operation reorders channels, which torch-pruning does not notice.

    It is a shuffle by name, or a view of five and more axes as a map [B, C, H, W].
    """
    name = operation.name().lower() if hasattr(operation, "name") else ""
    return "shuffle" in name or ("view" in name and len(getattr(operation, "_saved_self_sym_sizes", ())) > 4)


def _is_broadcast(node: Any, indices: Sequence[int]) -> bool:
    """Return whether a node is a parameter, or embedding, with all these channels, and they are read one by one."""
    parameter = node.module.weight if isinstance(node.module, nn.Embedding) else node.module
    has_all = isinstance(parameter, nn.Parameter) and parameter.shape[channel_axis(parameter)] == len(indices)
    return has_all and _reads_one_by_one(node)


def _reads_one_by_one(node: Any) -> bool:
    names = [(output, output.grad_fn.name()) for output in node.outputs]
    return all(BROADCASTS.match(name) or (COPIES.match(name) and _reads_one_by_one(output)) for output, name in names)


def _is_weightless(member: Any) -> bool:
    return isinstance(member, nn.Module) and next(member.parameters(), None) is None
