"""All the state of a training job in one file, and back: weights, optimizer, loss scale, position, history."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.cause import cause
from stages.errors import RunError
from stages.tensor_file import load_tensors, save_tensors


@dataclass(frozen=True)
class Machinery:
    """What training changes: the student with the losses' adapters, the optimizer, and the loss scale of float16."""

    modules: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


@dataclass
class State:
    """Where a job is: the next step to take, the sums of this epoch's losses, the metrics of the epochs before.

    parts: into how many a batch is divided, whose gradients are added up, since memory was short.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    parts: int = 1


def save(path: Path, machinery: Machinery, state: State) -> None:
    """Write the checkpoint, whole or not at all."""
    packed = machinery.optimizer.state_dict()
    tensors = {f"modules/{name}": tensor for name, tensor in machinery.modules.state_dict().items()}
    tensors |= {f"sums/{name}": total for name, total in state.sums.items()}
    for index, slots in packed["state"].items():
        tensors |= {f"optimizer/{index}/{slot}": value for slot, value in slots.items() if isinstance(value, Tensor)}
    record = {
        "epoch": state.epoch,
        "step": state.step,
        "history": state.history,
        "parts": state.parts,
        "scaler": machinery.scaler.state_dict(),
    }
    save_tensors(path, tensors, record)


def restore(path: Path, machinery: Machinery, state: State) -> None:
    """Put a checkpoint back into what `save` was given. Raises RunError where it does not fit."""
    tensors, record = load_tensors(path)
    try:
        machinery.modules.load_state_dict(_below(tensors, "modules/"))
        # Its groups are as they were made: what changes in them, the learning rate, is set before every step.
        groups = machinery.optimizer.state_dict()["param_groups"]
        machinery.optimizer.load_state_dict({"state": _slots(tensors, machinery.optimizer), "param_groups": groups})
        machinery.scaler.load_state_dict(record["scaler"])
        state.epoch, state.step, state.history = _position(record)
        state.parts = max(1, int(record.get("parts", 1)))  # of an older version: whole batches
        device = next(machinery.modules.parameters()).device
        state.sums = {name: total.to(device) for name, total in _below(tensors, "sums/").items()}
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise RunError(f"{path} does not fit this job ({cause(error)}): delete it to start the job afresh.") from error


def _slots(tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """What the optimizer keeps of each parameter, by its number. ValueError where it is of other parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in _below(tensors, "optimizer/").items():
        index, slot = key.split("/", 1)
        if not index.isdecimal() or value.shape not in (torch.Size(), parameters[int(index)].shape):
            raise ValueError(f"{key} is of another network")
        slots.setdefault(int(index), {})[slot] = value
    return slots


def _position(record: dict[str, Any]) -> tuple[int, int, list[dict[str, Any]]]:
    """Epoch, step and history, if they can be a job's: each epoch that is done has left a line."""
    epoch, step, history = record["epoch"], record["step"], record["history"]
    whole = isinstance(history, list) and all(isinstance(line, dict) and _is_sound(line) for line in history)
    if not whole or type(epoch) is not int or epoch != len(history) or type(step) is not int or step < 0:
        raise ValueError(f"epoch {str(epoch)[:20]}, step {str(step)[:20]} is no place where a job can be")
    return epoch, step, history


def _is_sound(line: dict[str, Any]) -> bool:
    """Whether an epoch's line has the numbers that others reckon with; the accuracy of a job that has a test set."""
    return "wall_s" in line and all(isinstance(line.get(key, 0.0), float | int) for key in ("wall_s", "accuracy"))


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
