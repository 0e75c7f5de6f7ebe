"""Checkpoints: all state of a training job in one file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.stages.errors import RunError, cause
from kdpipe.stages.models.safetensors_io import load_tensors, save_tensors


@dataclass(frozen=True)
class TrainState:
    """The objects that training changes: the student with the losses' adapters, the optimizer, the loss scaler."""

    modules: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


@dataclass
class Progress:
    """The position of a job.

    Attributes:
        step: The next step in the epoch.
        sums: The sums of this epoch's losses.
        history: The metrics of the finished epochs.
        micro_batches: The number of micro-batches per batch, more than 1 after memory ran out.
        stopped_by: The callback that asked to end the training after this epoch.
        callbacks: The states of the callbacks, by name.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    micro_batches: int = 1
    stopped_by: str | None = None
    callbacks: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(path: Path, state: TrainState, progress: Progress) -> None:
    """Write a checkpoint atomically."""
    packed = state.optimizer.state_dict()
    tensors = {f"modules/{name}": tensor for name, tensor in state.modules.state_dict().items()}
    tensors |= {f"sums/{name}": total for name, total in progress.sums.items()}
    for index, slots in packed["state"].items():
        tensors |= {f"optimizer/{index}/{slot}": value for slot, value in slots.items() if isinstance(value, Tensor)}
    keys = ("epoch", "step", "history", "micro_batches", "stopped_by", "callbacks")
    record = {key: getattr(progress, key) for key in keys}
    save_tensors(path, tensors, record | {"scaler": state.scaler.state_dict()})


def load_checkpoint(path: Path, state: TrainState, progress: Progress) -> None:
    """Load a checkpoint into `state` and `progress`; raises RunError if it does not fit the job."""
    tensors, record = load_tensors(path)
    try:
        state.modules.load_state_dict(_with_prefix(tensors, "modules/"))
        # The only group setting that changes, the learning rate, is set before every step.
        groups = state.optimizer.state_dict()["param_groups"]
        state.optimizer.load_state_dict({"state": _slots(tensors, state.optimizer), "param_groups": groups})
        state.scaler.load_state_dict(record["scaler"])
        progress.epoch, progress.step, progress.history = _position(record)
        progress.micro_batches = max(1, int(record["micro_batches"]))
        progress.stopped_by, progress.callbacks = record.get("stopped_by"), dict(record.get("callbacks") or {})
        device = next(state.modules.parameters()).device
        progress.sums = {name: total.to(device) for name, total in _with_prefix(tensors, "sums/").items()}
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise RunError(f"{path} does not fit this job ({cause(error)}): delete it to restart the job.") from error


def _slots(tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Return the optimizer's state by parameter number; raises ValueError if it belongs to other parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in _with_prefix(tensors, "optimizer/").items():
        index, slot = key.split("/", 1)
        if not index.isdecimal() or value.shape not in (torch.Size(), parameters[int(index)].shape):
            raise ValueError(f"{key} belongs to another network")
        slots.setdefault(int(index), {})[slot] = value
    return slots


def _position(record: dict[str, Any]) -> tuple[int, int, list[dict[str, Any]]]:
    """Return epoch, step and history; raises ValueError unless each finished epoch has a line with its figures."""
    epoch, step, history = record["epoch"], record["step"], record["history"]
    for line in history:
        math.fsum([line["wall_s"], line.get("accuracy", 0.0)])  # jobs without a test set have no accuracy
    if type(epoch) is not int or epoch != len(history) or type(step) is not int or step < 0:
        raise ValueError(f"epoch {str(epoch)[:20]}, step {str(step)[:20]} is not a valid position")
    return epoch, step, history


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
