"""Checkpoints: all state of a training job in one file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.stages.compute.settings import EXACT, ComputeSettings
from kdpipe.stages.errors import RunError, cause
from kdpipe.stages.evaluation.main_metric import metric_of
from kdpipe.stages.models.safetensors_io import load_tensors, save_tensors
from kdpipe.stages.training.optimization.averaging import WeightAverage
from kdpipe.stages.training.optimization.optimizer_state import pack_optimizer, unpack_optimizer


@dataclass(frozen=True)
class TrainState:
    """The objects that training changes.

    Attributes:
        modules: The student with the losses' adapters.
        optimizer: The optimizer of all of them.
        scaler: The loss scaler.
        average: The moving average of the student's weights, if there is one.
        settings: How the student is computed.
    """

    modules: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None = None
    settings: ComputeSettings = EXACT


@dataclass
class Progress:
    """The position of a job.

    Attributes:
        step: The next step in the epoch.
        sums: The sums of this epoch's losses.
        history: The metrics of the finished epochs.
        micro_batches: The number of micro-batches per batch, more than 1 after memory ran out.
        made_with: The threads, processes, device and libraries of the process that wrote the checkpoint, and how it
            computed the student.
        stopped_by: The callback that asked to end the training after this epoch.
        callbacks: The states of the callbacks, by name.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    micro_batches: int = 1
    made_with: dict[str, Any] = field(default_factory=dict)
    stopped_by: str | None = None
    callbacks: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(path: Path, state: TrainState, progress: Progress) -> None:
    """Write a checkpoint atomically."""
    tensors, optimizer = pack_optimizer(state.optimizer)
    tensors |= {f"modules/{name}": tensor for name, tensor in state.modules.state_dict().items()}
    tensors |= {f"sums/{name}": total for name, total in progress.sums.items()}
    tensors |= {f"average/{name}": tensor for name, tensor in state.average.tensors.items()} if state.average else {}
    keys = ("epoch", "step", "history", "micro_batches", "made_with", "stopped_by", "callbacks")
    record = {key: getattr(progress, key) for key in keys}
    save_tensors(path, tensors, record | {"scaler": state.scaler.state_dict(), "optimizer": optimizer})


def circumstances_of(path: Path) -> dict[str, Any]:
    """Return what a checkpoint was made with."""
    return dict(load_tensors(path)[1].get("made_with") or {})


def load_checkpoint(path: Path, state: TrainState, progress: Progress) -> None:
    """Load a checkpoint into `state` and `progress`; raises RunError if it does not fit the job."""
    tensors, record = load_tensors(path)
    try:
        state.modules.load_state_dict(_with_prefix(tensors, "modules/"))
        of_optimizer = {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer/")}
        unpack_optimizer(state.optimizer, of_optimizer, record["optimizer"])
        if state.average:
            state.average.load(_with_prefix(tensors, "average/"))
        if record["scaler"]:  # none where the job began in another precision
            state.scaler.load_state_dict(record["scaler"])
        progress.epoch, progress.step, progress.history = _position(record)
        progress.micro_batches = max(1, int(record["micro_batches"]))
        progress.made_with = dict(record.get("made_with") or {})
        progress.stopped_by, progress.callbacks = record.get("stopped_by"), dict(record.get("callbacks") or {})
        device = next(state.modules.parameters()).device
        progress.sums = {name: total.to(device) for name, total in _with_prefix(tensors, "sums/").items()}
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise RunError(f"{path} does not fit this job ({cause(error)}): delete it to restart the job.") from error


def _position(record: dict[str, Any]) -> tuple[int, int, list[dict[str, Any]]]:
    """Return epoch, step and history; raises ValueError unless each finished epoch has a line with its figures."""
    epoch, step, history = record["epoch"], record["step"], record["history"]
    for line in history:
        math.fsum([line["wall_s"], line.get(metric_of(line).name, 0.0)])  # jobs without a test set have none
    if type(epoch) is not int or epoch != len(history) or type(step) is not int or step < 0:
        raise ValueError(f"epoch {str(epoch)[:20]}, step {str(step)[:20]} is not a valid position")
    return epoch, step, history


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
