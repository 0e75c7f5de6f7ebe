"""The options, commands and recipe keys that messages name exist."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator

import typer
from support.kdpipe_process import RECIPE
from support.paths import ROOT

from kdpipe.pipeline.main import app
from kdpipe.pipeline.recipe.load import load_recipe_with_origins

OTHER_PROGRAMS = {
    "--extra",
    "--ipc",
    "--max-restarts",
    "--porcelain",
    "--shm-size",
    "--signals-to-handle",
    "--untracked-files",
}
"""Options of git, docker, torchrun and uv."""

FILES = {"views.png", "compare.html", "data.mdb", "teacher.toml"}

OPTION = re.compile(r"(?<![\w(-])--[a-z][a-z0-9-]+")
COMMAND = re.compile(r"`kdpipe ([a-z][a-z-]*(?: [a-z][a-z-]*)?)")
KEY = re.compile(r"(?<![\w./])(?:data|views|teacher|cache|student|compress)\.[a-z_]+(?:\.[a-z_]+)*(?![\w(/])")


@functools.cache
def messages() -> list[tuple[str, str]]:
    """Return the place and the text of every string in the sources that is not a docstring."""
    found = []
    for path in (
        path for folder in ("pipeline", "stages", "store", "kdpipe") for path in (ROOT / folder).rglob("*.py")
    ):
        tree = ast.parse(path.read_text())
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node.value))
    return found


def named(pattern: re.Pattern[str]) -> dict[str, str]:
    """Return what messages name, each with a place."""
    return {found: place for place, text in messages() for found in pattern.findall(text)}


def commands_of(command: typer.core.TyperGroup, path: str = "") -> Iterator[tuple[str, object]]:
    for name, inner in getattr(command, "commands", {}).items():
        yield path + name, inner
        yield from commands_of(inner, f"{path}{name} ")


COMMANDS = dict(commands_of(typer.main.get_command(app)))


def test_options_exist():
    known = {
        option for command in COMMANDS.values() for one in command.params for option in (*one.opts, *one.secondary_opts)
    }
    known |= {option for one in typer.main.get_command(app).params for option in one.opts} | {"--help"}
    assert "--set" in known
    assert {option: place for option, place in named(OPTION).items() if option not in known | OTHER_PROGRAMS} == {}


def test_commands_exist():
    wrong = {
        name: place
        for name, place in named(COMMAND).items()
        if name not in COMMANDS and name.split()[0] not in COMMANDS
    }
    assert wrong == {}


def test_recipe_keys_exist(tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)
    settings = load_recipe_with_origins(recipe, (), {})[1]
    known = {key.rsplit(".", number)[0] for key in settings for number in range(key.count(".") + 1)}
    assert {"data.num_train", "compress.quantize.scheme", "student.train"} <= known
    assert {key: place for key, place in named(KEY).items() if key not in known | FILES} == {}
