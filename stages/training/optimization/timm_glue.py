"""Optimizers, schedules and gradient clipping of timm, where it is installed: names `timm:NAME` in a recipe."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kdpipe.stages.errors import RecipeError, cause
from kdpipe.stages.training.optimization.keywords import select_keywords
from kdpipe.store.errors import did_you_mean

PREFIX = "timm:"

SET_HERE = ("optimizer", "sched", "num_epochs", "min_lr", "warmup_epochs", "step_on_epochs", "updates_per_epoch")
"""Arguments of timm's `create_scheduler_v2` that the recipe's own keys set."""

NAMES = "it has cosine, tanh, poly, step, multistep, wsd, rsqrt and constant"
"""The schedules of timm, which has no list of them."""


def import_timm(module: str, needed_by: str) -> Any:
    """Import a module of timm; raises RecipeError if it is not installed."""
    try:
        return importlib.import_module(f"timm.{module}")
    except ImportError as error:
        raise RecipeError(f"{needed_by} needs timm ({cause(error)}): pip install 'kdpipe[timm]'.") from error


def timm_optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the optimizer that the recipe names `timm:...`, with timm's defaults.

    Raises:
        RecipeError: timm is not installed, has no such optimizer, or cannot run it here.
    """
    optim = import_timm("optim", f"train.optimizer = {name!r}")
    own, known = name.removeprefix(PREFIX), optim.list_optimizers()
    if own not in known:
        hint = did_you_mean(own, known, limit=3, otherwise="timm.optim.list_optimizers() lists them.")
        raise RecipeError(f"train.optimizer: timm has no optimizer {own[:80]!r}; {hint}")
    try:
        found: Callable[..., torch.optim.Optimizer] = optim.get_optimizer_class(own)
    except (ImportError, AssertionError) as error:  # of apex and bitsandbytes
        raise RecipeError(f"train.optimizer = {name!r} does not run here ({cause(error)}): choose another.") from error
    return found


def timm_schedule(
    name: str, settings: Mapping[str, Any], args: Mapping[str, Any], steps_per_epoch: int
) -> Callable[[int], float]:
    """Return the learning rate of timm's schedule, with its own warm-up, as a function of the optimizer step.

    Args:
        name: As in the recipe, `timm:...`.
        settings: `lr`, `min_lr`, `epochs`, `warmup_epochs` and `milestones`.
        args: Further arguments of timm's `create_scheduler_v2`.
        steps_per_epoch: The number of steps of an epoch.

    Raises:
        RecipeError: timm is not installed, has no such schedule, or refuses an argument.
    """
    create = import_timm("scheduler", f"train.schedule = {name!r}").create_scheduler_v2
    own = name.removeprefix(PREFIX)
    if own in ("plateau", "none"):
        raise RecipeError(f"train.schedule = {name!r} is not a function of the step: choose another, as constant.")
    offered = {"decay_milestones": settings["milestones"]} if settings["milestones"] else {}
    arguments = select_keywords(create, offered, args, "train.schedule_args", SET_HERE)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings["lr"])
    try:
        schedule, _ = create(
            optimizer,
            own,
            num_epochs=max(1, settings["epochs"]),
            min_lr=settings["min_lr"],
            warmup_epochs=settings["warmup_epochs"],
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
            **arguments,
        )
    except Exception as error:
        raise RecipeError(f"train.schedule = {name[:80]!r}: timm cannot build it ({cause(error)}); {NAMES}.") from error

    def rate(step: int) -> float:
        schedule.step_update(step)
        return float(optimizer.param_groups[0]["lr"])

    return rate
