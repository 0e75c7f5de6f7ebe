"""The questions of `kdpipe recipe new`: each with a default, and asked only where it makes a difference."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.recipe.answers import (
    Given,
    read_data,
    read_layers,
    read_losses,
    read_model,
    read_name,
    read_number,
    read_place,
    read_ratio,
    read_weights,
    read_yes,
)
from pipeline.recipe.habits import habit_of
from pipeline.recipe.rehearsal import NUM_CLASSES, SHAPES
from pipeline.recipe.text import FEATURE_LOSSES, OFFERED_LOSSES, TRAINED_HERE
from stages.datasets.sources import KNOWN_NAMES
from stages.errors import ModelError, RecipeError
from stages.models.build import PUBLISHED, ModelConfig, build_model
from stages.models.small_images import SMALL_IMAGE_NETWORKS


def _always(given: Given) -> bool:
    return True


@dataclass(frozen=True)
class Question:
    """text: for people. default: what Enter takes; None where there is none. read: an answer's value, or RecipeError.
    needed: whether it is to be asked at all, after what was answered before.
    """

    key: str
    text: str
    default: Callable[[Given], str | None]
    read: Callable[[str, Given], Any]
    needed: Callable[[Given], bool] = _always

    @property
    def option(self) -> str:
        """By which the answer can be given on the command line."""
        return "--loss" if self.key == "losses" else f"--{self.key.replace('_', '-')}"


def last_map(model: str, given: Given) -> str | None:
    """The path of the last module of `model` that gives a map, by the names that networks have for their stages."""
    _, channels, side = SHAPES.get(given["data"], (NUM_CLASSES, 3, None))
    side = given.get("image_size") or side or 64
    shape = {"num_classes": NUM_CLASSES, "in_channels": wanted_channels(given) or channels or 3}
    try:
        built = build_model(ModelConfig(name=model), **shape, image_size=(side, side), seed=0)
    except (ModelError, RecipeError):
        return None
    stages = [name for name, _ in built.named_children() if re.match(r"stage|layer|block|features", name)]
    return stages[-1] if stages else None


def wanted_channels(given: Given) -> int | None:
    """The channels that the networks take and the images of a named set do not have; None where they fit."""
    _, channels, _ = SHAPES.get(given["data"], (0, None, None))
    of_torchvision = any(
        given[role] not in SMALL_IMAGE_NETWORKS and not given[role].startswith("python:")
        for role in ("teacher", "student")
    )
    return 3 if of_torchvision and channels == 1 else None


def _default_layers(given: Given) -> str | None:
    pair = last_map(given["student"], given), last_map(given["teacher"], given)
    return f"{pair[0]},{pair[1]}" if pair[0] and pair[1] else None


def _default_name(given: Given) -> str:
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(given["file"]).stem).strip("-_.") if given.get("file") else ""
    return stem[:100] or "first"


def _default_weights(given: Given) -> str:
    plain = given["teacher"] in SMALL_IMAGE_NETWORKS or given["teacher"].startswith("python:")
    return TRAINED_HERE if plain else PUBLISHED


def _fixed(text: str) -> Callable[[Given], str]:
    def default(given: Given) -> str:
        return text

    return default


QUESTIONS = (
    Question("name", "Name of the experiment", _default_name, read_name),
    Question("data", f"Data set ({', '.join(KNOWN_NAMES)})", _fixed("digits"), read_data),
    Question("root", "Folder in which it lies", _fixed("data"), read_place, lambda given: given["data"] != "digits"),
    Question(
        "image_size",
        "Side of the images in pixels, to which they are cropped and resized",
        _fixed("224"),
        read_number(8, 2**14),
        lambda given: given["data"].startswith("imagefolder:"),
    ),
    Question("teacher", "Teacher's network", lambda given: habit_of(given["data"]).teacher, read_model),
    Question(
        "teacher_weights",
        "Teacher's weights (train: trained here; published: torchvision's; or a .safetensors or state dict file)",
        _default_weights,
        read_weights,
    ),
    Question("student", "Student's network", lambda given: habit_of(given["data"]).student, read_model),
    Question("losses", f"Losses, one or several ({', '.join(OFFERED_LOSSES)})", _fixed("kd"), read_losses),
    Question(
        "layers",
        "Modules that losses on features compare: student's,teacher's",
        _default_layers,
        read_layers,
        lambda given: any(loss in FEATURE_LOSSES for loss in given["losses"]),
    ),
    Question("seeds", "Number of seeds, a student alone and one distilled for each", _fixed("3"), read_number(1, 100)),
    Question("compress", "Prune, quantize and export the students (yes, no)", _fixed("yes"), read_yes),
    Question(
        "prune_ratio",
        "Share of the channels to prune (0: quantize only)",
        _fixed("0.25"),
        read_ratio,
        lambda given: bool(given["compress"]),
    ),
)
"""In the order in which they are asked: defaults go by what was answered before."""
