"""The options that commands share, declared once: a command takes them as one `asked`, and adds its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from pipeline.session.paths import named
from pipeline.session.signals import parse_duration


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a TOML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in student.train.lr=0.05.")
]
RunFolder = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", parser=named, help="The run folder [default: runs/NAME].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document; progress is JSON lines on stderr.")]
MaxDuration = Annotated[
    float | None,
    typer.Option(
        "--max-duration",
        metavar="3h30m",
        parser=_duration,
        help="Save and exit 75 when so much time has gone by since the start.",
    ),
]
Share = Annotated[bool, typer.Option("--share", help="Use a GPU although another process does.")]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Also write scalars for TensorBoard into the run folder.")
]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of a command that walks a recipe. max_duration: seconds."""

    set_: Overrides = None
    run: RunFolder = None
    max_duration: MaxDuration = None
    share: Share = False
    as_json: AsJson = False


@dataclass(frozen=True, kw_only=True)
class AskedJob(Asked):
    """What is asked of one that also writes into its run folder."""

    tensorboard: TensorBoard = False


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let typer see, in the place of the argument `asked` of a command, the options that make it up."""
    hints = get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters
    kind: type[Asked] = hints["asked"]
    common = get_type_hints(kind, include_extras=True)
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, parameter in parameters.items()
        if name != "asked"
    ]
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=common[field.name]
        )
        for field in fields(kind)
    ]

    @wraps(command)
    def called(**given: Any) -> None:
        asked = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        command(**given, asked=asked)

    called.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    called.__annotations__ = {}
    return called
