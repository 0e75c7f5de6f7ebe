"""Where torch-pruning loses a network's channels on the way: the module in which they are shuffled or reshaped."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stages.compression.bare_copy import bare_copy
from stages.errors import ModelError, cause


@contextmanager
def following(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Where torch-pruning fails at what is done inside, a ModelError says so, and where the channels get lost."""
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning tells of parameters outside layers; they are left alone
        try:
            yield
        except ModelError:
            raise
        except Exception as fault:
            where = _reshaping_module(model, example)
            raise ModelError(
                f"this model cannot be pruned: torch-pruning cannot follow its channels ({cause(fault)}), as "
                f"where they are shuffled or reshaped{f', here in {where}' if where else ''}; "
                "set compress.steps = ['quantize'], or prune.kind = 'weights'."
            ) from fault


@contextmanager
def entered(model: nn.Module) -> Iterator[list[str]]:
    """The paths of the modules that are running, the innermost last: after a fault, where it happened."""
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
    """Notes in which module a map [B, C, H, W] was first given more axes, or shuffled."""

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
    copy = bare_copy(model).eval()
    try:
        with torch.no_grad(), entered(copy) as running, _Reshapes(running) as reshapes:
            copy(example)
    except Exception:
        return None  # half pruned, it may not run any more
    first: str | None = reshapes.first
    return first
