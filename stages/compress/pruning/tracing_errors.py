"""Locate the module where channel tracking fails: channels are shuffled or reshaped there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.models.clone import clone_without_hooks


@contextmanager
def follow_channels(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Convert failures of torch-pruning inside the context to a ModelError that names the module."""
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about parameters outside layers, which stay unpruned
        try:
            yield
        except ModelError:
            raise
        except Exception as error:
            where = _reshaping_module(model, example)
            raise ModelError(
                f"this model cannot be pruned: torch-pruning cannot follow its channels ({cause(error)}), "
                f"which are shuffled or reshaped{f', here in {where}' if where else ''}; "
                "set compress.steps = ['quantize'], or prune.kind = 'weights'."
            ) from error


@contextmanager
def trace_scope(model: nn.Module) -> Iterator[list[str]]:
    """Record the paths of the running modules, the innermost last: after an error, its place."""
    running: list[str] = []
    hooks = []
    for path, module in model.named_modules():
        name = f"{path!r} ({type(module).__name__})" if path else f"the model's own forward ({type(module).__name__})"
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


class _Reshapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that records the first module in which a map [B, C, H, W] got more axes, or was shuffled."""

    def __init__(self, running: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running = running
        self.first: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_map = bool(args) and isinstance(args[0], Tensor) and args[0].dim() == 4
        more = isinstance(out, Tensor) and out.dim() > 4
        if self.first is None and self.running and is_map and (more or "shuffle" in str(func)):
            self.first = self.running[-1]
        return out


def _reshaping_module(model: nn.Module, example: Tensor) -> str | None:
    copy = clone_without_hooks(model).eval()
    try:
        with torch.no_grad(), trace_scope(copy) as running, _Reshapes(running) as reshapes:
            copy(example)
    except Exception:
        return None  # a half-pruned model may not run
    first: str | None = reshapes.first
    return first
