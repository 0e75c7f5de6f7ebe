"""Find the blocks of a network that it runs without, and skip them.

A block gives an output of its input's shape. Which modules are blocks is decided by what they compute, not by their
names: the first of these kinds that a network has.

1. Residual blocks, the innermost: their output is a sum with their input (ResNets, inverted residuals with a shortcut,
   the layers of ViTs).
2. Modules whose class occurs again in the same `nn.Sequential` or `nn.ModuleList`, the outermost (the layers of BERT).
3. Convolutions and linear layers of an `nn.Sequential`, each with the norms and activations after it (VGG).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.stages.compress.pruning.channel_groups import output_layers, traceable
from kdpipe.stages.compress.pruning.exclusions import WEIGHT_LAYERS
from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.models.hooks import model_errors

Block = tuple[str, ...]
"""The paths of the modules that are skipped together; the first one names the block."""


class SkippedBlock(nn.Module):
    """What takes the place of a module that was removed: it returns its first input."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return inputs[0] if inputs else next(iter(named.values()))


def skip_blocks(model: nn.Module, paths: Any) -> nn.Module:
    """Replace the modules at recorded `paths` by `SkippedBlock`, in place, and return the model.

    Raises:
        ModelError: If the record does not fit the architecture; nothing is changed then.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str) for path in paths):
        raise ModelError("the record of removed blocks is no list of module paths.")
    if wrong := next((path for path in paths if not path or path not in modules), None):
        raise ModelError(f"the record of removed blocks is of another architecture: there is no module {wrong!r}.")
    if "" in paths or any(other.startswith(f"{path}.") for path in paths for other in paths):
        raise ModelError("the record of removed blocks names the whole network, or a block inside another one.")
    for path in paths:
        model.set_submodule(path, SkippedBlock())
    return model


def skipped_paths(model: nn.Module) -> list[str]:
    """Return the paths of the modules that are skipped, in module order."""
    return [path for path, module in model.named_modules() if isinstance(module, SkippedBlock)]


@contextmanager
def skipped(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Skip modules while the block runs."""
    own = {path: model.get_submodule(path) for path in paths}
    try:
        skip_blocks(model, list(own))
        yield
    finally:
        for path, module in own.items():
            model.set_submodule(path, module)


def find_blocks(
    model: nn.Module, example: Tensor, *, exclude: Sequence[str] = (), read: Sequence[str] = ()
) -> tuple[list[Block], dict[str, str]]:
    """Return the blocks that may be removed, in module order, and why each of the others stays, by its path.

    Those stay that hold a module in `exclude` or lie in one, those with one of the layers `read` inside (of a loss: at
    the block itself it reads what comes before), and those without which the model does not run.

    Args:
        model: The network, left unchanged.
        example: Images [B, C, H, W], of which only the shape counts.
        exclude: Module paths.
        read: Paths of layers whose outputs are needed.
    """
    with traceable(model):
        calls, logits = _observe(model, example)
        outputs = output_layers(model, example)
        found = _candidates(model, calls, outputs)
        reasons = {
            block[0]: _needed(block, exclude, read) or _failure(model, block, example, logits) for block in found
        }
    return (
        [block for block in found if reasons[block[0]] is None],
        {path: reason for path, reason in reasons.items() if reason is not None},
    )


@dataclass(frozen=True)
class _Call:
    """The call of a module, in a forward pass that calls it once.

    Attributes:
        keeps_shape: Whether it returns a tensor of the shape of its first input.
        is_residual: Whether that is a sum with this input.
    """

    keeps_shape: bool
    is_residual: bool


def _observe(model: nn.Module, example: Tensor) -> tuple[Mapping[str, _Call], torch.Size]:
    """Return the calls of the modules that a forward pass calls once, by path, and the shape of the logits."""
    inputs: dict[str, list[tuple[torch.Size | None, Any]]] = {}
    calls: dict[str, _Call] = {}

    def before(path: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        first = next(iter((*arguments, *named.values())), None)
        seen = (first.shape, first.grad_fn) if isinstance(first, Tensor) else (None, None)
        inputs.setdefault(path, []).append(seen)

    def after(path: str, output: Any) -> None:
        shape, operation = inputs[path][-1]
        keeps = isinstance(output, Tensor) and output.shape == shape
        calls[path] = _Call(keeps, keeps and _adds(output.grad_fn, operation))

    with ExitStack() as hooks, torch.enable_grad(), model_errors(example):
        for path, module in model.named_modules():
            hooks.enter_context(
                module.register_forward_pre_hook(
                    lambda _, arguments, named, path=path: before(path, arguments, named), with_kwargs=True
                )
            )
            hooks.enter_context(module.register_forward_hook(lambda _, __, output, path=path: after(path, output)))
        logits = model(example.clone().requires_grad_() * 1).shape  # no leaf, so that operations may be in place
    return {path: call for path, call in calls.items() if len(inputs[path]) == 1}, logits


def _adds(output: Any, source: Any) -> bool:
    """Return whether a path from an autograd operation back to `source` has a sum and else operations of one input."""
    pending, visited = [(output, False)], set[tuple[Any, bool]]()
    while pending and source is not None:
        node, summed = pending.pop()
        if node is source and summed:
            return True
        if node is None or node is source or (node, summed) in visited:
            continue
        visited.add((node, summed))
        is_sum = node.name().startswith("AddBackward")
        if is_sum or len(node.next_functions) == 1:
            pending += [(previous, summed or is_sum) for previous, _ in node.next_functions]
    return False


def _candidates(model: nn.Module, calls: Mapping[str, _Call], outputs: Sequence[nn.Module]) -> list[Block]:
    """Return the blocks of the first kind that the network has."""
    modules = dict(model.named_modules())
    written = [path for path, module in modules.items() if any(module is output for output in outputs)]

    def is_block(path: str) -> bool:
        layers = [module for module in modules[path].modules() if isinstance(module, WEIGHT_LAYERS)]
        return calls[path].keeps_shape and bool(layers) and path not in written

    kept = [path for path in modules if path and path in calls and is_block(path)]
    residual = [path for path in kept if calls[path].is_residual]
    if innermost := [path for path in residual if not any(other.startswith(f"{path}.") for other in residual)]:
        return [(path,) for path in innermost]
    repeated = [path for path in kept if _is_repeated(modules, path)]
    if outermost := [path for path in repeated if not any(path.startswith(f"{other}.") for other in repeated)]:
        return [(path,) for path in outermost]
    return [
        (path, *_followers(modules, calls, path))
        for path in kept
        if isinstance(modules[path], WEIGHT_LAYERS) and type(modules[path.rpartition(".")[0]]) is nn.Sequential
    ]


def _is_repeated(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Return whether a module with layers inside, no plain container, has a sibling of its class in a container."""
    parent, kind = modules[path.rpartition(".")[0]], type(modules[path])
    if not isinstance(parent, nn.Sequential | nn.ModuleList) or issubclass(kind, WEIGHT_LAYERS):
        return False
    return kind is not nn.Sequential and sum(type(child) is kind for child in parent.children()) > 1


def _followers(modules: Mapping[str, nn.Module], calls: Mapping[str, _Call], path: str) -> Iterator[str]:
    """Yield what follows a layer in its Sequential and belongs to it: norms, activations and dropout."""
    prefix, _, own = path.rpartition(".")
    names = [name for name, _ in modules[prefix].named_children()]
    for name in names[names.index(own) + 1 :]:
        follower = f"{prefix}.{name}" if prefix else name
        has_layers = any(isinstance(module, WEIGHT_LAYERS) for module in modules.get(follower, nn.Module()).modules())
        if follower not in calls or not calls[follower].keeps_shape or has_layers:
            return
        yield follower


def _needed(block: Block, exclude: Sequence[str], read: Sequence[str]) -> str | None:
    """Return which setting keeps a block, None if none does."""

    def holds(path: str, other: str) -> bool:
        return other.startswith(f"{path}.")

    if any(path == other or holds(path, other) or holds(other, path) for path in block for other in exclude):
        return "named in prune.exclude"
    inner = next((layer for path in block for layer in read if holds(path, layer)), None)
    return f"a loss reads its layer {inner!r}" if inner else None


def _failure(model: nn.Module, block: Block, example: Tensor, wanted: torch.Size) -> str | None:
    """Return why the model does not run without a block, None if it does."""
    try:
        with torch.no_grad(), skipped(model, block):
            found = model(example).shape
    except Exception as error:
        return f"the model does not run without it ({cause(error)})"
    return None if found == wanted else f"without it the model gives logits of the shape {list(found)}"
