"""The state of any optimizer as tensors and JSON, and back, without a pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kdpipe.stages.errors import RecipeError

PREFIX = "optimizer"


def pack_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of an optimizer's state by name, and a JSON value with the rest.

    Raises:
        RecipeError: It keeps something that is neither a tensor, nor a number, a text, None, or a container of these.
    """
    tensors: dict[str, Tensor] = {}
    packed, kind = optimizer.state_dict(), type(optimizer).__name__
    slots = {str(index): slot for index, slot in packed["state"].items()}
    groups = [{key: value for key, value in one.items() if _is_plain(value)} for one in packed["param_groups"]]
    rest = {key: value for key, value in packed.items() if key not in ("state", "param_groups")}
    record = {
        "state": _pack(slots, PREFIX, tensors, kind),
        "groups": _pack(groups, f"{PREFIX}/groups", tensors, kind),
        "rest": _pack(rest, f"{PREFIX}/rest", tensors, kind),
    }
    return tensors, record


def unpack_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], record: Any) -> None:
    """Restore, bit for bit, what `pack_optimizer` returned.

    Of the groups' settings those that an optimizer may change are restored; the learning rate is set before each step.

    Raises:
        ValueError, LookupError, TypeError: The state belongs to another job.
    """
    left = dict(tensors)
    slots = _unpack(record["state"], PREFIX, left)
    saved_groups, rest = (_unpack(record[key], f"{PREFIX}/{key}", left) for key in ("groups", "rest"))
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    state = {int(index): slot for index, slot in slots.items()}
    if left or not set(state) <= set(range(len(parameters))):
        raise ValueError(f"its optimizer belongs to another network: {[*left, *state][0]!s:.40}")
    fresh = optimizer.state_dict()["param_groups"]
    groups = [
        {**own, **{key: value for key, value in saved.items() if key not in ("params", "lr")}}
        for own, saved in zip(fresh, saved_groups, strict=True)
    ]
    optimizer.load_state_dict({**rest, "state": state, "param_groups": groups})
    for index, slot in state.items():
        parameter = parameters[index]
        exact = _exact(optimizer.state[parameter], slot)
        optimizer.state[parameter] = {key: _in_format_of(parameter, value) for key, value in exact.items()}


def _exact(loaded: Any, saved: Any) -> Any:
    """Return what was saved, on the device to which torch moved it: it casts tensors, and takes texts for lists."""
    if isinstance(saved, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(saved, dict):
        return {key: _exact(loaded[key], value) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(_exact(one, value) for one, value in zip(loaded, saved, strict=True))
    return saved


def _in_format_of(parameter: Tensor, value: Any) -> Any:
    """Return a tensor of the parameter's shape in its memory format, as the optimizer made it; all else as it is."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _pack(value: Any, path: str, tensors: dict[str, Tensor], optimizer: str) -> Any:
    """Return `value` as JSON: a container as an object of one key, its kind; a tensor as its shape."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": list(value.shape)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _pack(one, f"{path}/{key}", tensors, optimizer) for key, one in value.items()}}
    if type(value) in (list, tuple):
        parts = [_pack(one, f"{path}/{number}", tensors, optimizer) for number, one in enumerate(value)]
        return {type(value).__name__: parts}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise RecipeError(
        f"the optimizer {optimizer} keeps a {type(value).__name__} in its state ({path}), which a checkpoint cannot "
        "hold: choose another train.optimizer."
    )


def _unpack(record: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return the value of `_pack`, with its tensors taken out of `tensors`; raises ValueError if it does not fit."""
    if not isinstance(record, dict):
        return record
    ((kind, content),) = record.items()
    if kind == "tensor":
        tensor = tensors.pop(path)
        if list(tensor.shape) != content:
            raise ValueError(f"{path} belongs to another network")
        return tensor
    if kind == "dict":
        return {key: _unpack(one, f"{path}/{key}", tensors) for key, one in content.items()}
    if kind == "float":
        return float(content)
    parts = [_unpack(one, f"{path}/{number}", tensors) for number, one in enumerate(content)]
    return tuple(parts) if kind == "tuple" else parts
