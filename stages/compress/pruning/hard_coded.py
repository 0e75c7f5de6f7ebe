"""Find the layers whose number of channels a forward relies on."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kdpipe.stages.compress.pruning.channel_groups import find_channels, follow_channels, remove, traceable
from kdpipe.stages.compress.pruning.importance import measure_of
from kdpipe.stages.compress.pruning.widths import record_widths
from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.hooks import get_module


def require_it_runs(
    pruned: nn.Module, model: nn.Module, example: Tensor, exclude: Sequence[str], *, heads: bool = False
) -> None:
    """Raise ModelError unless `pruned` gives as many logits as `model`; the message names the layers to exclude."""
    with torch.no_grad():
        wanted = clone_without_hooks(model).eval()(example).shape
    copy = clone_without_hooks(pruned).eval()
    error = _failure(copy, example, wanted)
    if error is None:
        return
    paths = list(_hard_coded(model, example, wanted, exclude, heads))
    advice = (
        f"it relies on the number of channels of {', '.join(map(repr, paths))}. Set compress.prune.exclude = "
        f"{[*exclude, *paths]}, or write it for any number."
        if paths
        else "set compress.prune.kind = 'weights', or compress.steps = ['quantize']."
    )
    raise ModelError(f"the pruned model does not run ({cause(error)}){_place(error, copy)}: {advice}") from error


def _failure(model: nn.Module, example: Tensor, wanted: torch.Size) -> Exception | None:
    """Return why the network, in eval mode, does not give logits of the `wanted` shape; None if it does."""
    try:
        with torch.no_grad():
            found = model(example).shape
    except Exception as error:
        return error
    return None if found == wanted else ValueError(f"it makes {list(found)}, wanted {list(wanted)}")


def _hard_coded(
    model: nn.Module, example: Tensor, wanted: torch.Size, exclude: Sequence[str], heads: bool
) -> Iterator[str]:
    """Yield a layer of each group without half of whose channels, all others intact, the network does not run."""
    number, count = 0, 1
    while number < count:
        copy = clone_without_hooks(model)
        excluded = [get_module(copy, path) for path in exclude]
        with traceable(copy), follow_channels():
            channels = find_channels(
                copy,
                example,
                excluded,
                measure_of("l1"),
                full_widths=record_widths(copy),
                with_batch_norm=False,
                heads=heads,
            )
            widths = [len(group.importance) for group in channels.groups]
            count, group = len(widths), channels.groups[number]
            widths[number] = max(1, widths[number] // 2)
            remove(channels, widths)
        if _failure(copy.eval(), example, wanted) is not None:
            yield group.path
        number += 1


def _place(error: Exception, model: nn.Module) -> str:
    """Return a clause that names the innermost module in whose forward an error arose."""
    paths = {module: path for path, module in model.named_modules()}
    frames = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    running = [module for module in frames if isinstance(module, nn.Module) and module in paths]
    return f", in the forward of {paths[running[-1]]!r} ({type(running[-1]).__name__})" if running else ""
