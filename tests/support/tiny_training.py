"""A training of a tiny network on bright squares, without a store: for tests of the training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdpipe.stages.errors import StoppedEarly
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.task import TrainingTask
from support.device import DEVICE
from support.tiny_run import StopAfter, squares, tiny_context

NORMALIZE = Normalization((0.5,), (0.5,))
STEPS = 6


def tiny_network() -> nn.Sequential:
    """Convolution, batch norm and linear layer on images [B, 1, 8, 8]."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)]
    return nn.Sequential(*layers)


def tiny_job(folder: Path, model: nn.Module, **config: Any) -> TrainJob:
    """Two epochs of three steps; `config` are keys of TrainConfig."""
    folder.mkdir(exist_ok=True)
    context = tiny_context(folder, train_set=squares(100, 0), test_set=squares(20, 1, "test"))
    task, test = TrainingTask(context.train_loader, 2, NORMALIZE), context.evaluation(NORMALIZE)
    settings = TrainConfig(**{"epochs": 2, "batch_size": 32, "lr": 0.01, "checkpoint_every_s": 1000, **config})
    return TrainJob("train-student", "test", model, task, test, settings, 0, JobDir(folder))


def trained(folder: Path, monitor: RunMonitor | None = None, **config: Any) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train the tiny network; returns it, and the metrics of each epoch without times."""
    model = tiny_network()
    history = train(tiny_job(folder, model, **config), DEVICE, monitor or RunMonitor())
    return model, [{key: value for key, value in line.items() if key != "wall_s"} for line in history]


def trained_in_pieces(folder: Path, **config: Any) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train as `trained` does, stopped after every second step and resumed."""
    while True:
        try:
            return trained(folder, RunMonitor(should_stop=StopAfter(2)), **config)
        except StoppedEarly:
            continue


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have the same bits."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
