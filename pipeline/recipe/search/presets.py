"""Spaces of a search for usual questions: which temperature and weights, which losses, which layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain, combinations
from typing import Any

from kdpipe.pipeline.recipe.search.config import Preset
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import Loss

ON_LOGITS = ("kd", "dkd", "dist", "nkd")
ON_MAPS = ("hint", "at", "sp", "rkd")
ON_VECTORS = ("cosine", "rkd", "sp", "pkt")

MAX_PAIRS = 4


def preset_space(preset: Preset, losses: Sequence[Loss]) -> Mapping[str, Any]:
    """Return the parameters of a preset by dotted key, for a recipe's losses.

    Raises:
        RecipeError: The recipe has no loss to which it applies.
    """
    spaces = {"temperature-and-alpha": _temperature_and_alpha, "losses": _losses, "layers": _layers}
    return spaces[preset](losses)


def _temperature_and_alpha(losses: Sequence[Loss]) -> dict[str, Any]:
    """Return temperature and weight of the first loss with a temperature, and the weight of the labels."""
    for number, loss in enumerate(losses):
        weight = loss.weight
        if _has(loss, "temperature") and isinstance(weight, int | float) and weight > 0:
            return {
                f"distill.{number}.temperature": {"low": 1.0, "high": 20.0, "log": True},
                f"distill.{number}.weight": {"low": 0.1 * weight, "high": float(weight)},
                "student.hard_label_weight": {"low": 0.0, "high": 1.0},
            }
    raise RecipeError(
        "search.preset = 'temperature-and-alpha' needs a loss with a temperature and a constant weight, such as kd: "
        "add one to [[distill]], or name keys in search.space."
    )


def _losses(losses: Sequence[Loss]) -> dict[str, Any]:
    """Return other losses for each entry of the recipe: on the same layers, or on logits; features may go."""
    if not losses:
        raise RecipeError("search.preset = 'losses' needs losses to replace: add an entry [[distill]].")
    return {f"distill.{number}.loss": _instead_of(loss) for number, loss in enumerate(losses)}


def _instead_of(loss: Loss) -> list[str]:
    if not _has(loss, "layers"):
        return list(dict.fromkeys([loss.loss, *ON_LOGITS]))
    layers = getattr(loss, "layers", ())
    others = ON_VECTORS if any("pre_logits" in pair for pair in layers) else ON_MAPS
    return list(dict.fromkeys([loss.loss, *others, "off"]))


def _layers(losses: Sequence[Loss]) -> dict[str, Any]:
    """Return the parts of each entry's list of layers."""
    found = {}
    for number, loss in enumerate(losses):
        pairs = [list(pair) for pair in getattr(loss, "layers", ())]
        if 2 <= len(pairs) <= MAX_PAIRS:
            parts = chain.from_iterable(combinations(pairs, size) for size in range(1, len(pairs) + 1))
            found[f"distill.{number}.layers"] = [list(part) for part in parts]
    if not found:
        raise RecipeError(
            f"search.preset = 'layers' tries the parts of a list of layers: give a loss in [[distill]] 2 to "
            f"{MAX_PAIRS} pairs of layers."
        )
    return found


def _has(loss: Loss, key: str) -> bool:
    return any(one.name == key for one in fields(loss))
