"""Schedules of the learning rate by name: pure functions, so that a resumed job needs no saved state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from kdpipe.stages.errors import RecipeError, cause
from kdpipe.stages.plugins.registry import Registry
from kdpipe.stages.plugins.user_code import user_code_context
from kdpipe.stages.training.optimization.keywords import select_keywords
from kdpipe.stages.training.optimization.timm_glue import PREFIX, timm_schedule

OFFERED = (
    "progress",
    "epoch",
    "step",
    "lr",
    "min_lr",
    "epochs",
    "warmup_epochs",
    "milestones",
    "gamma",
    "steps_per_epoch",
)
"""What a schedule may name: `progress` is 0 at the end of the warm-up and 1 at the end of the training; `epoch` has a
fraction. The rest are keys of the recipe, and the number of steps."""


def cosine(progress: float, lr: float, min_lr: float) -> float:
    """Return half a cosine from `lr` to `min_lr` (Loshchilov & Hutter 2017)."""
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def step(epoch: float, lr: float, min_lr: float, milestones: Sequence[int], gamma: float) -> float:
    """Return `lr` times `gamma` for each milestone that is past, at least `min_lr`."""
    return max(min_lr, lr * gamma ** sum(epoch >= milestone for milestone in milestones))


def polynomial(progress: float, lr: float, min_lr: float, power: float = 1.0) -> float:
    """Return the rate that falls from `lr` to `min_lr` as (1 - progress)^power."""
    return float(min_lr + (lr - min_lr) * (1 - progress) ** power)


def linear(progress: float, lr: float, min_lr: float) -> float:
    """Return the rate on a straight line from `lr` to `min_lr`."""
    return polynomial(progress, lr, min_lr)


def constant(lr: float) -> float:
    """Return `lr`."""
    return lr


SCHEDULES: Registry[Callable[..., float]] = Registry(
    "schedule",
    "train.schedule",
    {"cosine": cosine, "step": step, "linear": linear, "polynomial": polynomial, "constant": constant},
)


def make_schedule(
    name: str, settings: Mapping[str, Any], args: Mapping[str, Any], steps_per_epoch: int
) -> Callable[[int], float]:
    """Return the learning rate as a function of the optimizer step, from 0.

    Args:
        name: Of the schedule. Before it, the rate rises linearly over the warm-up; timm's have their own.
        settings: `lr`, `min_lr`, `epochs`, `warmup_epochs`, `milestones` and `gamma`.
        args: Further keywords of the schedule.
        steps_per_epoch: The number of steps of an epoch.

    Raises:
        RecipeError: There is no such schedule, or it has no such argument.
    """
    if name.startswith(PREFIX):
        return timm_schedule(name, settings, args, steps_per_epoch)
    schedule, lr, warmup = SCHEDULES.get(name), settings["lr"], settings["warmup_epochs"]
    fixed = {**settings, "steps_per_epoch": steps_per_epoch}
    named = select_keywords(schedule, dict.fromkeys(OFFERED), args, "train.schedule_args", OFFERED)

    def rate(step: int) -> float:
        epoch = step / steps_per_epoch
        if epoch < warmup:
            return float(lr * (step + 1) / max(1.0, warmup * steps_per_epoch))
        progress = min(1.0, (epoch - warmup) / max(1e-9, settings["epochs"] - warmup))
        now = {**fixed, "progress": progress, "epoch": epoch, "step": step}
        return _called(name, schedule, {key: now.get(key, value) for key, value in named.items()})

    return rate


def _called(name: str, schedule: Callable[..., float], keywords: Mapping[str, Any]) -> float:
    """Return what a schedule returns; raises RecipeError unless it is a learning rate."""
    try:
        with nullcontext() if name in SCHEDULES.builtin else user_code_context():
            rate = float(schedule(**keywords))
    except Exception as error:
        raise RecipeError(f"train.schedule = {name!r} failed with {dict(keywords)} ({cause(error)}).") from error
    if not 0 <= rate < math.inf:
        raise RecipeError(
            f"train.schedule = {name!r} returned {rate} with {dict(keywords)}: wanted a rate of 0 or more."
        )
    return rate
