"""Modules by their dotted path, as hooks and adapters name them (`layer3`, `blocks.5`)."""

from __future__ import annotations

from torch import nn

from kdpipe.stages.errors import ModelError
from kdpipe.store.errors import did_you_mean


def get_module(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule of `model` at `path`; raises ModelError, with the nearest paths, if there is none."""
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    del modules[""]  # the model itself: its output is the logits, which need no hook
    if path in modules:
        return modules[path]
    children = ", ".join(name for name, _ in model.named_children())
    hint = did_you_mean(path, modules, limit=3, otherwise=f"it has: {children}.")
    raise ModelError(f"the model has no module {path!r}; {hint}")
