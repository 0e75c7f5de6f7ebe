"""Modules by their dotted path, as hooks and adapters name them (`layer3`, `blocks.5`)."""

from __future__ import annotations

import difflib

from torch import nn

from kdpipe.stages.errors import ModelError


def get_module(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule of `model` at `path`; raises ModelError, with the nearest paths, if there is none."""
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    del modules[""]  # the model itself: its output is the logits, which need no hook
    if path in modules:
        return modules[path]
    nearest = difflib.get_close_matches(path, modules, n=3, cutoff=0.4)
    paths = nearest or [name for name, _ in model.named_children()]
    raise ModelError(f"the model has no module {path!r}; {'nearest' if nearest else 'it has'}: {', '.join(paths)}.")
