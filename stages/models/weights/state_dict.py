"""Weights of a network: loading them from untrusted files, counting and hashing them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.weights.file import Entries, read_weights
from kdpipe.stages.models.weights.match import find_state_dict

STATISTICS = ("running_mean", "running_var")


def load_weights(
    model: nn.Module,
    path: Path,
    *,
    weights_key: str | None = None,
    fresh_head: int | None = None,
    without_head: bool = False,
    notify: Callable[[str], None] = lambda notice: None,
) -> None:
    """Fill `model` in place from a .safetensors file or a torch state dict.

    A torch file may hold state dicts under keys, as checkpoints do, and names may have a prefix: what fits the model is
    taken, and `notify` receives what was taken of several, and what was left out. Only tensors are read, never pickled
    objects.

    Args:
        model: The network.
        path: The file.
        weights_key: The key, and prefix, to take: `state_dict_ema`, `model.module.student`.
        fresh_head: The number of classes of a classifier that stays as it is, for weights of other classes.
        without_head: Whether the model has no classifier: that of the file is left out.
        notify: Receives a sentence on what was chosen.

    Raises:
        ModelError: The file is missing, damaged or unsafe, or its entries do not fit the model, or several do.
    """
    load_entries(
        model,
        read_weights(path),
        str(path),
        weights_key=weights_key,
        fresh_head=fresh_head,
        without_head=without_head,
        notify=notify,
    )


def load_entries(
    model: nn.Module,
    state_dicts: Mapping[str, Entries],
    source: str,
    *,
    weights_key: str | None = None,
    fresh_head: int | None = None,
    without_head: bool = False,
    notify: Callable[[str], None] = lambda notice: None,
) -> None:
    """Fill `model` in place from those of the `state_dicts`, read from `source`, that fit; see `load_weights`.

    Raises ModelError if none fits, or it holds NaN, infinity, or a variance below zero; nothing is loaded then.
    """
    found = find_state_dict(
        model, state_dicts, source, weights_key=weights_key, fresh_head=fresh_head, without_head=without_head
    )
    if fault := _invalid_values(found.entries, model):
        raise ModelError(f"{source}: {fault}; give weights of a trained network.")
    model.load_state_dict(found.entries)
    for notice in found.notices:
        notify(f"{source}: {notice}")


def weights_sha256(model: nn.Module) -> str:
    """Return the digest of a network's state dict."""
    return state_sha256(model.state_dict())


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the hex sha256 over the sorted entries of a state dict: name, dtype, shape, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy has no bfloat16
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable and frozen parameters, without buffers such as running means."""
    return sum(parameter.numel() for parameter in model.parameters())


def _invalid_values(stored: Mapping[str, Tensor], model: nn.Module) -> str | None:
    """Describe the first parameter or batch-norm statistic that is invalid; None where there is none.

    Other buffers may hold infinity: masks do.
    """
    checked = dict(model.named_parameters())
    checked |= {key: value for key, value in model.state_dict().items() if key.endswith(STATISTICS)}
    for name, own in checked.items():
        tensor = stored[name].to(own.dtype)
        if not bool(tensor.isfinite().all()):
            return f"{name} holds NaN or infinity"
        if name.endswith("running_var") and bool((tensor < 0).any()):
            return f"{name} holds a variance below zero"
    return None
