"""A copy of a model that nobody listens to: same weights, same modules, none of the hooks."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

LISTENERS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def bare_copy(model: nn.Module) -> nn.Module:
    """A deep copy without forward and backward hooks.

    A hook is somebody's ear at the original model (feature distillation): a copy that is traced or exported must not
    talk into it. Pre-hooks stay, since weight normalisation computes its weights in one.
    """
    # deepcopy looks into its memo first: for each table of hooks it finds an empty one, and never copies a listener.
    silent: dict[int, Any] = {
        id(table): type(table)()
        for module in model.modules()
        for name, table in vars(module).items()
        if name in LISTENERS
    }
    return copy.deepcopy(model, silent)
