"""`kdpipe recipe new`: ask, compose, check what was composed, and write it; nothing is written before all stands."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.recipe.layers import Layers
from pipeline.recipe.load import examine_layers
from pipeline.recipe.questions import QUESTIONS, Question, wanted_channels
from pipeline.recipe.rehearsal import rehearse_recipe
from pipeline.recipe.sentence import first_and_more
from pipeline.recipe.text import Answers, recipe_text
from pipeline.terminal.output import print_line
from stages.errors import RecipeError
from store.durable import write_atomically


def new_recipe(file: Path | None, options: Mapping[str, str | None], *, yes: bool) -> Path:
    """Ask what `options` leave open, or with `yes` take the defaults, and write the recipe; returns where it is.

    Raises RecipeError for a file that is there already, an option that cannot be, networks or losses that do not fit,
    and where there is nobody to ask.
    """
    if file is not None:
        require_new(file)
    given = _answers(file, options, yes)
    path = file or Path(f"{given['name']}.toml")
    require_new(path)
    text = recipe_text(_composed(path, given))
    _require_fine(path, text)
    require_new(path)  # somebody else may have made it while people thought
    write_atomically(path, text.encode("utf-8"))
    return path


def is_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin is not None and sys.stdin.isatty()


def require_new(path: Path) -> None:
    """Raise RecipeError where a recipe cannot be written without taking something away, or not at all."""
    if any(letter < " " or letter == "\x7f" for letter in str(path)):
        raise RecipeError(f"{str(path)!r} is no path: it has a control character.")
    if os.path.lexists(path):
        raise RecipeError(f"{path} is there already, and is not overwritten: name another file, or move it away.")
    if not path.parent.is_dir():
        raise RecipeError(f"there is no folder {path.parent} for {path.name}: make it first.")


def _answers(file: Path | None, options: Mapping[str, str | None], yes: bool) -> dict[str, Any]:
    given: dict[str, Any] = {"file": str(file) if file else ""}
    asks = not yes and is_terminal()
    for question in QUESTIONS:
        text = options.get(question.key)
        if not question.needed(given):
            if text is not None and question.key != "root":
                raise RecipeError(f"{question.option} is not asked for with these answers: leave it out.")
            given[question.key] = None
        elif text is not None:
            given[question.key] = _read_option(question, text, given)
        elif asks:
            given[question.key] = _ask(question, given)
        else:
            given[question.key] = _default(question, given, yes)
    return given


def _read_option(question: Question, text: str, given: Mapping[str, Any]) -> Any:
    try:
        return question.read(text.strip(), given)
    except RecipeError as error:
        raise RecipeError(f"{question.option}: {error}") from error


def _default(question: Question, given: Mapping[str, Any], yes: bool) -> Any:
    if not yes:
        raise RecipeError(
            "there is nobody to answer, as standard input is no terminal: give --yes to take the defaults, and options "
            "where you want something else."
        )
    default = question.default(given)
    if default is None:
        raise RecipeError(f"there is no default for {question.option}: give it.")
    return question.read(default, given)


def _ask(question: Question, given: Mapping[str, Any]) -> Any:
    """One answer from the terminal; what cannot be is told, and asked for again."""
    default = question.default(given)
    shown = f" [{default}]" if default is not None else ""
    while True:
        try:
            text = input(f"{question.text}{shown}: ").strip() or default or ""
        except UnicodeDecodeError as error:
            raise RecipeError("the answer is not UTF-8 text: nothing is written.") from error
        try:
            return question.read(text, given)
        except RecipeError as error:
            print_line(str(error))


def _composed(path: Path, given: Mapping[str, Any]) -> Answers:
    return Answers(
        file=str(path),
        name=given["name"],
        data=given["data"],
        root=given["root"] or "data",
        image_size=given["image_size"],
        teacher=given["teacher"],
        teacher_weights=given["teacher_weights"],
        student=given["student"],
        losses=given["losses"],
        layers=given["layers"],
        num_seeds=given["seeds"],
        compress=given["compress"],
        prune_ratio=given["prune_ratio"] or 0.0,
        channels=wanted_channels(given),
    )


def _require_fine(path: Path, text: str) -> None:
    """Raise RecipeError for answers that do not go together, before anything is written."""
    recipe, faults = examine_layers(Layers(str(path), text, tomllib.loads(text)))
    if recipe is not None and not faults:
        faults = list(rehearse_recipe(recipe).faults)
    if faults:
        raise RecipeError(f"these answers do not go together, and nothing is written: {first_and_more(faults)}")
