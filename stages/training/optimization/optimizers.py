"""Optimizers by name: torch's, registered ones, timm's and the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kdpipe.stages.errors import RecipeError, cause
from kdpipe.stages.plugins.registry import Registry
from kdpipe.stages.plugins.user_code import user_code_context
from kdpipe.stages.training.optimization.dot import DOT
from kdpipe.stages.training.optimization.keywords import select_keywords
from kdpipe.stages.training.optimization.timm_glue import PREFIX, timm_optimizer

OptimizerFactory = Callable[..., Optimizer]
Groups = Sequence[nn.Parameter] | Sequence[dict[str, Any]]

CLASSES: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.AdamW,
    torch.optim.Adam,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adafactor,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.ASGD,
    DOT,
)

OPTIMIZERS: Registry[OptimizerFactory] = Registry(
    "optimizer", "train.optimizer", {kind.__name__.lower(): kind for kind in CLASSES}
)

UNUSABLE = {
    "lbfgs": "it evaluates the loss several times a step",
    "sparseadam": "it is for sparse gradients, which these networks do not have",
    "muon": "torch's trains matrices only; 'timm:muon' trains the other weights with AdamW",
}
"""Optimizers of torch that are not offered, and why."""

TAKEN = ("params", "lr", "weight_decay", "momentum", "betas", "nesterov")
"""Keywords that the recipe's own keys set."""


def find_optimizer(name: str) -> OptimizerFactory:
    """Return the class or function that builds the optimizer `name`.

    Raises:
        RecipeError: There is none, or it cannot be used; the message has the nearest names.
    """
    if name.startswith(PREFIX):
        return timm_optimizer(name)
    if name.lower() in UNUSABLE and name not in OPTIMIZERS.registered():
        raise RecipeError(f"train.optimizer = {name!r} cannot be used: {UNUSABLE[name.lower()]}.")
    return OPTIMIZERS.get(name)


def optimizer_keywords(name: str, offered: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords for the optimizer `name`: those of `offered` that it names, and `args`.

    Raises:
        RecipeError: There is no such optimizer, or it has no such argument.
    """
    return select_keywords(find_optimizer(name), offered, args, "train.optimizer_args", TAKEN)


def make_optimizer(name: str, groups: Groups, offered: Mapping[str, Any], args: Mapping[str, Any]) -> Optimizer:
    """Build the optimizer `name` over parameters, or groups of them.

    Raises:
        RecipeError: There is no such optimizer, it refuses an argument, or it needs more than one gradient.
    """
    factory, keywords = find_optimizer(name), optimizer_keywords(name, offered, args)
    try:
        with user_code_context():
            optimizer = factory(groups, **keywords)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in keywords.items())
        raise RecipeError(f"train.optimizer = {name!r} cannot be built with {given} ({cause(error)}).") from error
    if not isinstance(optimizer, Optimizer):
        raise RecipeError(
            f"train.optimizer = {name!r} returned a {type(optimizer).__name__}, not a torch.optim.Optimizer."
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise RecipeError(f"train.optimizer = {name!r} cannot be used: {UNUSABLE['lbfgs']}.")
    if getattr(optimizer, "is_second_order", False):
        raise RecipeError(f"train.optimizer = {name!r} cannot be used: it needs second derivatives.")
    return optimizer
