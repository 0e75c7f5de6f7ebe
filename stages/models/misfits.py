"""What keeps stored entries from being a network's weights: said before any is loaded, so that none is half loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

MOST_NAMED = 3

STATISTICS = ("running_mean", "running_var")

MOST_LETTERS = 80
"""Of a name in a stranger's file, in a sentence."""


def misfits(stored: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> list[str]:
    """Missing entries, unexpected ones, other shapes or types; the first few of each. none where all can be loaded."""
    here = {key: stored[key] for key in wanted if key in stored}
    reshaped = [
        f"{key} is stored as {_shape(value)}, wanted {list(wanted[key].shape)}"
        for key, value in here.items()
        if _shape(value) != list(wanted[key].shape)
    ]
    retyped = [f"{key} is stored as {kind}" for key, value in here.items() if (kind := _odd_kind(value, wanted[key]))]
    return [
        *_first_few("missing ", [key for key in wanted if key not in stored]),
        *_first_few("unexpected ", [key[:MOST_LETTERS] for key in stored if key not in wanted]),
        *_first_few("", reshaped),
        *_first_few("", [] if reshaped else retyped),
    ]


def no_numbers(stored: Mapping[str, Tensor], model: nn.Module) -> str | None:
    """The first of the model's entries with which it gives no answer, and why; None where there is none.

    A buffer of another kind may hold infinity: masks do.
    """
    wanted = dict(model.named_parameters())
    wanted |= {key: one for key, one in model.state_dict().items() if key.endswith(STATISTICS)}
    for name, own in wanted.items():
        tensor = stored[name].to(own.dtype)
        if not bool(tensor.isfinite().all()):
            return f"{name} holds NaN or infinity"
        if name.endswith("running_var") and bool((tensor < 0).any()):
            return f"{name} holds a variance below zero"
    return None


def _shape(value: Any) -> list[int] | str:
    return list(value.shape) if isinstance(value, Tensor) else "no tensor"


def _odd_kind(value: Any, wanted: Tensor) -> str | None:
    """Why a tensor cannot become `wanted`, or would only by losing what it says; None where it can."""
    if not isinstance(value, Tensor):
        return None  # which its shape says already
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        kind = "meta" if value.is_meta else "quantized" if value.is_quantized else "sparse"
        return f"a {kind} tensor, wanted numbers"
    if value.is_complex() or (wanted.is_floating_point() and not value.is_floating_point()):
        return f"{_name(value)}, wanted {_name(wanted)}"
    return None


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _first_few(kind: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = f" and {len(entries) - MOST_NAMED} more" if len(entries) > MOST_NAMED else ""
    return [f"{kind}{', '.join(entries[:MOST_NAMED])}{more}"]
