"""`kdpipe recipe`: write a recipe by answering a few questions, check recipes, and print their JSON Schema."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pipeline.session.options import AsJson, Overrides
from pipeline.terminal.output import guarded, print_json, printable, say

recipe_app = typer.Typer(help="Write recipes, check them, and have editors know their keys.", no_args_is_help=True)


@recipe_app.command("new")
def recipe_new(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Where it goes [default: NAME.toml].")] = None,
    *,
    name: Annotated[str | None, typer.Option(help="The experiment's name, and its run folder's.")] = None,
    data: Annotated[str | None, typer.Option(help="digits, CIFAR100, imagefolder:PATH, npz:PATH and so on.")] = None,
    root: Annotated[str | None, typer.Option(help="The folder in which the data lies.")] = None,
    image_size: Annotated[str | None, typer.Option(help="To so many pixels photographs are resized.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The teacher's network.")] = None,
    teacher_weights: Annotated[str | None, typer.Option(help="train, published, or the path of a file.")] = None,
    student: Annotated[str | None, typer.Option(help="The student's network.")] = None,
    loss: Annotated[list[str] | None, typer.Option(help="What the teacher teaches by; repeatable.")] = None,
    layers: Annotated[str | None, typer.Option(help="STUDENT,TEACHER: the modules that they compare.")] = None,
    seeds: Annotated[str | None, typer.Option(help="How many students.")] = None,
    compress: Annotated[str | None, typer.Option(help="yes or no: prune, quantize and export them.")] = None,
    prune_ratio: Annotated[str | None, typer.Option(help="The share of the channels that goes.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: take the defaults of what is not given.")
    ] = False,
) -> None:
    """Write a recipe by answering a few questions. Enter takes what stands in brackets; options answer beforehand."""
    options = {key: given for key, given in locals().items() if key not in ("file", "loss", "yes")}
    with guarded(), nothing_written():
        from pipeline.recipe.new import new_recipe

        path = new_recipe(file, options | {"losses": ",".join(loss) if loss else None}, yes=yes)
    print(printable(f"{path}: written; next: kdpipe run {shlex.quote(str(path))}"))  # noqa: T201


@contextmanager
def nothing_written() -> Iterator[None]:
    """Say so where people break off in the middle of the questions: 130 for Ctrl-C, as shells have it, 1 for Ctrl-D."""
    from pipeline.terminal.exit_codes import FAILED, INTERRUPTED
    from stages.errors import StoppedEarly

    try:
        yield
    except (KeyboardInterrupt, StoppedEarly):
        say("interrupted: nothing is written.")
        raise typer.Exit(INTERRUPTED) from None
    except EOFError:
        say("there was no answer: nothing is written.")
        raise typer.Exit(FAILED) from None


@recipe_app.command("check")
def recipe_check(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="TOML files; all are checked.")],
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Find all faults of recipes. Without data, GPU or network: keys, values, networks, layers, losses, compression."""
    with guarded():
        from pipeline.recipe.check import check_recipe, print_checked
        from pipeline.terminal.exit_codes import USAGE

        sys.path.append(str(Path.cwd()))  # where `python:module:name` in a recipe finds the user's own modules
        checked = []
        for path in recipes:
            checked.append(check_recipe(path, set_ or (), os.environ))
            if not as_json:
                print_checked(checked[-1])
        if as_json:
            print_json({"command": "recipe check", "recipes": [one.to_json() for one in checked]})
        if not all(one.fine for one in checked):
            raise typer.Exit(USAGE)


@recipe_app.command("schema")
def recipe_schema() -> None:
    """Print the JSON Schema of recipes. Editors complete and check TOML by it: see docs/recipes.md."""
    with guarded():
        import json

        from pipeline.recipe.schema import recipe_json_schema

        print(json.dumps(recipe_json_schema(), indent=2, ensure_ascii=False))  # noqa: T201
