"""Define `kdpipe recipe`: write a recipe interactively, check recipes, and print their JSON Schema."""

from __future__ import annotations

import atexit
import gc
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kdpipe.pipeline.session.guard import guarded
from kdpipe.pipeline.session.options import AsJson, SetOption
from kdpipe.pipeline.terminal.output import print_json, print_line, printable

NEXT = {
    "recipe check": "everything that can be checked without the data",
    "plan": "time, disk and memory of all stages",
    "views": "the augmented images, as a picture",
    "run": "all stages",
}
"""The commands after `kdpipe recipe new`, in order."""

recipe_app = typer.Typer(help="Write and check recipes, and print their JSON Schema.", no_args_is_help=True)


@recipe_app.command("new")
def recipe_new(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="File to write [default: NAME.toml].")] = None,
    *,
    name: Annotated[str | None, typer.Option(help="Name of the experiment and its run folder.")] = None,
    data: Annotated[str | None, typer.Option(help="digits, CIFAR100, imagefolder:PATH, table:PATH and so on.")] = None,
    root: Annotated[str | None, typer.Option(help="The folder of the data.")] = None,
    image_size: Annotated[str | None, typer.Option(help="Size to resize photos to, in pixels.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Model of the teacher.")] = None,
    teacher_weights: Annotated[str | None, typer.Option(help="train, published, or the path of a file.")] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="published, a file with names, or none: classes of a teacher that has more than the data."),
    ] = None,
    normalization: Annotated[
        str | None, typer.Option(help="imagenet, cifar10, cifar100, mnist, or MEAN/STD: of a teacher from a file.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="Model of the student.")] = None,
    loss: Annotated[list[str] | None, typer.Option(help="A distillation loss; repeatable.")] = None,
    layers: Annotated[str | None, typer.Option(help="STUDENT,TEACHER: the modules to compare.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Number of students.")] = None,
    compress: Annotated[str | None, typer.Option(help="yes or no: prune, quantize and export them.")] = None,
    prune_ratio: Annotated[str | None, typer.Option(help="Fraction of the channels to prune.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask: use the defaults for missing answers.")] = False,
) -> None:
    """Write a recipe interactively. Enter accepts the default in brackets; options answer questions in advance."""
    answers = {key: value for key, value in locals().items() if key not in ("file", "loss", "yes")}
    with guarded(), _abortable():
        from kdpipe.pipeline.recipe.new import new_recipe

        path = new_recipe(file, answers | {"losses": ",".join(loss) if loss else None}, yes=yes)
    print(printable(f"wrote {path}; next:"))  # noqa: T201
    for command, what in NEXT.items():
        print(printable(f"  kdpipe {command:<12} {shlex.quote(str(path))}  # {what}"))  # noqa: T201


@contextmanager
def _abortable() -> Iterator[None]:
    """Exit with status 130 at Ctrl-C, and 1 at Ctrl-D, with a sentence."""
    from kdpipe.pipeline.terminal.exit_codes import FAILED, INTERRUPTED
    from kdpipe.stages.errors import StoppedEarly

    try:
        yield
    except (KeyboardInterrupt, StoppedEarly, EOFError) as error:
        print_line("interrupted; nothing was written.")
        raise typer.Exit(FAILED if isinstance(error, EOFError) else INTERRUPTED) from None


@recipe_app.command("check")
def recipe_check(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="TOML files; all are checked.")],
    set_: SetOption = None,
    as_json: AsJson = False,
) -> None:
    """Report all errors in recipes. Keys, values, models, layers, losses and compression; needs no data and no GPU."""
    with guarded(), _without_collection():
        from kdpipe.pipeline.recipe.check import check_recipe, print_checked
        from kdpipe.pipeline.terminal.exit_codes import USAGE

        checked = []
        for path in recipes:
            checked.append(check_recipe(path, set_ or (), os.environ))
            if not as_json:
                print_checked(checked[-1])
        if as_json:
            print_json({"command": "recipe check", "recipes": [result.to_json() for result in checked]})
        if not all(result.ok for result in checked):
            raise typer.Exit(USAGE)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Do not look for garbage, now and when Python ends: among what torch loads that takes a third of the command."""
    gc.disable()
    try:
        yield
        if not {"onnx", "triton"} & sys.modules.keys():  # their bindings would print what was not collected
            atexit.register(gc.freeze)
    finally:
        gc.enable()


@recipe_app.command("schema")
def recipe_schema() -> None:
    """Print the JSON Schema of recipes. For completion and checks in editors: see docs/recipes.md."""
    with guarded():
        import json

        from kdpipe.pipeline.recipe.schema import recipe_json_schema

        print(json.dumps(recipe_json_schema(), indent=2, ensure_ascii=False))  # noqa: T201
