"""Options shared by commands: a command takes them as one parameter `options`, and adds its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from kdpipe.pipeline.session.paths import output_path
from kdpipe.pipeline.session.signals import parse_duration
from kdpipe.pipeline.terminal.output import Verbosity, set_verbosity, verbosity


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _verbosity_callback(level: Verbosity) -> Callable[[typer.Context, bool], bool]:
    def callback(context: typer.Context, is_set: bool) -> bool:
        if is_set:
            if verbosity() not in (Verbosity.NORMAL, level):
                raise typer.BadParameter("--verbose and --quiet exclude each other.")
            set_verbosity(level)
            context.call_on_close(lambda: set_verbosity(Verbosity.NORMAL))
        return is_set

    return callback


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a TOML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in student.train.lr=0.05.")
]
RunDir = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", parser=output_path, help="Run folder [default: runs/NAME].")
]
WorkspaceDir = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        metavar="DIR",
        parser=output_path,
        envvar="KDPIPE_WORKSPACE",
        help="Use the teachers, stores and students of the runs in DIR, or none [default: the run folder's folder].",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document; progress is JSON lines on stderr.")]
EXIT_75 = "Save and exit with status 75 this long after the start."
MaxDuration = Annotated[float | None, typer.Option("--max-duration", metavar="3h30m", parser=_duration, help=EXIT_75)]
Share = Annotated[bool, typer.Option("--share", help="Use a GPU even if another process uses it.")]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard scalars into the run folder.")]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_verbosity_callback(Verbosity.VERBOSE),
        help="Also print timings, and the traceback of an error.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        callback=_verbosity_callback(Verbosity.QUIET),
        help="No progress: only warnings and errors on stderr.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Options of every command that takes a recipe. `max_duration` is in seconds."""

    set_: SetOption = None
    run: RunDir = None
    workspace: WorkspaceDir = None
    max_duration: MaxDuration = None
    share: Share = False
    as_json: AsJson = False
    verbose: Verbose = False
    quiet: Quiet = False


@dataclass(frozen=True, kw_only=True)
class JobOptions(CommonOptions):
    """Options of every command that also writes into its run folder."""

    tensorboard: TensorBoard = False


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `options` of a command by the options in it, as typer needs them."""
    hints = get_type_hints(command, include_extras=True)
    kind: type[CommonOptions] = hints["options"]
    common = get_type_hints(kind, include_extras=True)
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "options"
    ]
    shared = [
        parameter.replace(annotation=common[name]) for name, parameter in inspect.signature(kind).parameters.items()
    ]

    @wraps(command)
    def wrapped(**arguments: Any) -> None:
        options = kind(**{parameter.name: arguments.pop(parameter.name) for parameter in shared})
        command(**arguments, options=options)

    wrapped.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {}
    return wrapped
