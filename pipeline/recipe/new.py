"""Write a recipe for `kdpipe recipe new`: ask the questions, fill the template, check the recipe, write the file."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdpipe.pipeline.recipe.questions import QUESTIONS, Question
from kdpipe.pipeline.recipe.template import Answers, recipe_text
from kdpipe.pipeline.terminal.output import print_line, printable
from kdpipe.stages.errors import RecipeError
from kdpipe.store.fs.atomic_write import write_atomically


def new_recipe(file: Path | None, options: Mapping[str, str | None], *, yes: bool) -> Path:
    """Ask what `options` leave open and write the recipe; return its path.

    Args:
        file: Path of the recipe; by default NAME.toml.
        options: Answers by the question's key, as texts.
        yes: Take the defaults instead of asking.

    Raises:
        RecipeError: The file exists, an option is invalid, the answers do not fit together, or stdin is not a terminal.
    """
    if file is not None:
        require_new(file)
    answers = Answers(file=str(file or ""))
    for question in QUESTIONS:
        setattr(answers, question.key, _answer(question, options.get(question.key), answers, yes))
    path = file or Path(f"{answers.name}.toml")
    answers.file = str(path)
    text = recipe_text(answers)
    _require_valid(path, text)
    require_new(path)
    write_atomically(path, text.encode("utf-8"))
    return path


def is_terminal() -> bool:
    """Return whether standard input is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def require_new(path: Path) -> None:
    """Raise RecipeError if `path` exists, or cannot be created."""
    if any(letter < " " or letter == "\x7f" for letter in str(path)):
        raise RecipeError(f"invalid path {str(path)!r}: it contains a control character.")
    if os.path.lexists(path):
        raise RecipeError(f"{path} already exists and is not overwritten: choose another name, or move it away.")
    if not path.parent.is_dir():
        raise RecipeError(f"the folder {path.parent} does not exist: create it first.")


def _answer(question: Question, option: str | None, answers: Answers, yes: bool) -> Any:
    if not question.applies(answers):
        if option is not None and question.key != "root":
            raise RecipeError(f"{question.option} does not apply to these answers: leave it out.")
        return None
    default = question.default(answers)
    if option is None and not yes:
        if is_terminal():
            return _ask(question, default, answers)
        raise RecipeError(
            "stdin is not a terminal: pass --yes to accept the defaults, and options for what should differ."
        )
    text = default if option is None else option.strip()
    if text is None:
        raise RecipeError(f"{question.option} has no default here: pass it.")
    try:
        return question.parse(text, answers)
    except RecipeError as error:
        raise RecipeError(f"{question.option}: {error}") from error


def _ask(question: Question, default: str | None, answers: Answers) -> Any:
    """Ask at the terminal until the answer is valid."""
    shown = f" [{default}]" if default is not None else ""
    for line in question.hints(answers):
        print(printable(line))  # noqa: T201
    while True:
        try:
            text = input(f"{question.text}{shown}: ").strip() or default or ""
        except UnicodeDecodeError as error:
            raise RecipeError("the answer is not UTF-8 text: nothing was written.") from error
        try:
            return question.parse(text, answers)
        except RecipeError as error:
            print_line(str(error))


def _require_valid(path: Path, text: str) -> None:
    """Raise RecipeError if the answers do not fit together."""
    # These import torch, which the first questions do not need.
    from kdpipe.pipeline.recipe.dry_build import dry_build
    from kdpipe.pipeline.recipe.load import validate
    from kdpipe.pipeline.recipe.messages import first_and_more
    from kdpipe.pipeline.recipe.overrides import Overrides

    recipe, faults = validate(Overrides(str(path), tomllib.loads(text)))
    if recipe is not None and not faults:
        faults, _ = dry_build(recipe)
    if faults:
        raise RecipeError(f"these answers do not fit together, nothing was written: {first_and_more(faults)}")
