"""Answers to the questions of `kdpipe recipe new`, read at once: a slip is told where it is made. Each reader takes the
text and what was answered before, returns the value, or raises RecipeError with a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.recipe.rehearsal import KINDS
from pipeline.recipe.text import OFFERED_LOSSES
from stages.config import Place
from stages.datasets.sources import KNOWN_NAMES
from stages.errors import RecipeError
from stages.models.build import PUBLISHED, TORCHVISION, list_models
from stages.models.small_images import SMALL_IMAGE_NETWORKS

Given = Mapping[str, Any]
"""What has been answered so far, by question."""


def read_name(text: str, given: Given) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}", text):
        raise RecipeError(
            f"{text!r} is no name of a run folder: letters, digits, `_`, `.` and `-`, a letter or digit first."
        )
    return text


def read_place(text: str, given: Given) -> str:
    try:
        return TypeAdapter(Place).validate_python(text)
    except ValidationError as error:
        raise RecipeError(
            f"{text[:80]!r} is no path: {error.errors()[0]['msg'].removeprefix('Value error, ')}."
        ) from error


def read_data(text: str, given: Given) -> str:
    kind, colon, rest = text.partition(":")
    known = {name.lower(): name for name in KINDS}
    kind = known.get(kind.lower(), kind)
    takes_more = kind in ("imagefolder", "npz", "python")
    if kind not in KINDS or takes_more != bool(colon and rest):
        raise RecipeError(f"{text[:80]!r} is no data set: known are {', '.join(KNOWN_NAMES)}.")
    return read_place(kind + colon + rest, given)


def read_model(text: str, given: Given) -> str:
    if text in SMALL_IMAGE_NETWORKS or text.startswith("python:"):
        return read_place(text, given)
    known = list_models()
    if text in known or (text.startswith(TORCHVISION) and text.removeprefix(TORCHVISION) in known):
        return text
    near = get_close_matches(text.lower(), known, 3)
    hint = f"nearest: {', '.join(near)}" if near else "a network of your own is python:package.module:factory"
    raise RecipeError(f"no model is called {text[:80]!r}; {hint}.")


def read_weights(text: str, given: Given) -> str:
    if text == PUBLISHED and given["teacher"] in SMALL_IMAGE_NETWORKS:
        raise RecipeError(f"there are no published weights of {given['teacher']}: train it here, or give a file.")
    return read_place(text, given)


def read_losses(text: str, given: Given) -> tuple[str, ...]:
    losses = tuple(dict.fromkeys(word for word in re.split(r"[\s,+]+", text) if word))
    unknown = [loss for loss in losses if loss not in OFFERED_LOSSES]
    if unknown or not losses:
        raise RecipeError(
            f"{', '.join(unknown) or 'nothing'} is not among the losses to begin with ({', '.join(OFFERED_LOSSES)}): "
            "`kdpipe losses` lists all that a recipe may name later."
        )
    return losses


def read_layers(text: str, given: Given) -> tuple[str, str]:
    pair = [word.strip() for word in text.split(",")]
    if len(pair) != 2 or not all(pair):
        raise RecipeError(
            f"{text[:80]!r} is no pair of modules: write the student's and the teacher's, as in layer3,layer3."
        )
    return read_place(pair[0], given), read_place(pair[1], given)


def read_number(least: int, most: int) -> Callable[[str, Given], int]:
    def read(text: str, given: Given) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
            raise RecipeError(f"{text[:80]!r} is no whole number from {least} to {most:,}.")
        return int(text)

    return read


def read_yes(text: str, given: Given) -> bool:
    if text.lower() not in ("y", "yes", "n", "no"):
        raise RecipeError(f"{text[:80]!r} is neither yes nor no.")
    return text.lower().startswith("y")


def read_ratio(text: str, given: Given) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise RecipeError(
            f"{text[:80]!r} is no share: write a number from 0 (no pruning) to less than 1, such as 0.25."
        )
    return ratio
