"""Deep-copy a model without its hooks, and preserve its training modes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def clone_without_hooks(model: nn.Module) -> nn.Module:
    """Return a deep copy without forward and backward hooks.

    Hooks (of feature distillation) belong to the original: tracing or exporting the copy must not trigger them. Pre-
    hooks stay, since weight normalization computes its weights in one.
    """
    # deepcopy consults its memo first: it finds an empty table for each table of hooks, and never copies a hook.
    empty_tables: dict[int, Any] = {
        id(table): type(table)()
        for module in model.modules()
        for name, table in vars(module).items()
        if name in HOOK_TABLES
    }
    return copy.deepcopy(model, empty_tables)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside torch.compile, DataParallel and DistributedDataParallel; it shares all weights."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training mode of every module at the end."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
