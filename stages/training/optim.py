"""Optimizers, and the learning rate as a pure function of the step, so that schedules have no state to save."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from kdpipe.stages.config import Count, section


@section
class TrainConfig:
    """Configuration of training: epochs, batches, optimizer and schedule.

    Attributes:
        epochs: Passes over the training set.
        batch_size: Samples per step; batches are full, and the few samples left over differ from epoch to epoch.
        optimizer: "sgd" or "adamw".
        lr: The highest learning rate.
        momentum: Momentum of SGD.
        nesterov: Whether SGD uses Nesterov momentum.
        weight_decay: The weight decay, in units of the learning rate.
        schedule: "cosine" decays to zero; "step" multiplies by gamma at the milestones.
        warmup_epochs: Epochs over which the rate rises linearly to lr.
        milestones: The epochs at which a step schedule multiplies the rate by gamma.
        gamma: The factor of a step schedule.
        precision: "auto" is mixed precision (bfloat16, else float16) on CUDA and float32 elsewhere.
        checkpoint_every_s: Seconds between checkpoints; it never changes the result.
    """

    epochs: Annotated[int, Field(ge=0, le=10**6)] = 20
    batch_size: Count = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1e6)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 5e-4
    schedule: Literal["cosine", "step"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    milestones: tuple[Count, ...] = ()
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    precision: Literal["auto", "float32"] = "auto"
    checkpoint_every_s: Annotated[float, Field(ge=0, le=1e9)] = 30.0


def build_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer over the parameters of the student and of the losses' adapters."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov and config.momentum > 0,
    )


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of optimizer step `step`, from 0: linear warm-up, then cosine to zero or steps down."""
    epoch = step / steps_per_epoch
    if epoch < config.warmup_epochs:
        return config.lr * (step + 1) / max(1.0, config.warmup_epochs * steps_per_epoch)
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    done = (epoch - config.warmup_epochs) / max(1e-9, config.epochs - config.warmup_epochs)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
