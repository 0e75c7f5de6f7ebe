"""Deep-copy a model without its hooks, and preserve its training modes and its device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

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
    hooks stay, since weight normalization computes its weights in one; the copy gets what it computed last.
    """
    # deepcopy consults its memo first: it finds an empty table for each table of hooks, and never copies a hook.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name in HOOK_TABLES:
                memo[id(value)] = type(value)()
            elif isinstance(value, Tensor) and not value.is_leaf:  # deepcopy refuses it
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside torch.compile, DataParallel and DistributedDataParallel; it shares all weights."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def unwrap_all(model: nn.Module) -> nn.Module:
    """Return the network inside its wrappers, and replace, in place, each module that is wrapped by what is inside."""
    model = unwrap(model)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and (inner := unwrap(module)) is not module:
            model.set_submodule(path, inner)
    return model


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training mode of every module at the end."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def evaluated_on(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep a network of the user in eval mode on a device within the block; then modes and device are as before."""
    before = next((one.device for one in chain(model.parameters(), model.buffers())), device)
    with preserve_modes(model):
        model.to(device).eval()
        try:
            yield
        finally:
            model.to(before)
