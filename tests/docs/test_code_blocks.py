"""Every code block of the documentation: Python runs, recipes are valid, commands and their options exist.

The Python blocks of a page are one script, run in an empty folder that has the files which the page shows with a
title. A comment `<!-- setup ... -->` adds code that readers do not see. A block that cannot run here has a comment
`<!-- not run: REASON -->` before it, and is reported as skipped.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from support.kdpipe_process import environment
from support.markdown import code_blocks, pages
from support.paths import PYTHONPATH, ROOT
from support.warm_process import WarmProcess

from kdpipe.pipeline.main import app
from kdpipe.pipeline.recipe.load import load_recipe, parse_recipe
from kdpipe.pipeline.recipe.sweep import sweep_overrides

BLOCKS = {page: code_blocks(page) for page in pages()}
RUNS = ("python", "setup")
LANGUAGES = (*RUNS, "toml", "bash", "json", "text")
OTHER_TOML = ("pyproject.toml", ".taplo.toml")
MINIMAL: dict[str, Any] = {
    "name": "page",
    "teacher": {"model": {"name": "cnn"}},
    "student": {"model": {"name": "cnn"}},
}
FEWER_IMAGES = ('load_dataset("digits"', 'load_dataset("digits", num_train=200')
BEFORE_A_COMMAND = ("run", "until", "do", "&&", "||", "|", ";", "--", "--no-python", "--rm")
END_OF_COMMAND = re.compile(r"[;&|<>()]+")
OUR_FILE = re.compile(r"(benchmarks|docs|recipes|tests|examples|\.ci)/[\w./-]+")


def blocks(*languages: str) -> list[Any]:
    found = [block for page in BLOCKS.values() for block in page if block.language in languages]
    assert found
    return [pytest.param(block, id=str(block)) for block in found]


def has_python(page: Path) -> bool:
    return any(block.language == "python" for block in BLOCKS[page])


def write_files(page: Path, folder: Path) -> None:
    """Write the files that a page shows with a title."""
    for block in BLOCKS[page]:
        if block.title is not None:
            assert not (folder / block.title).exists(), f"{block}: a second {block.title}"
            (folder / block.title).write_text(block.code)


def script_of(page: Path) -> str:
    """Return the Python blocks of a page as one script with the page's line numbers."""
    lines = [""] * len(page.read_text().splitlines())
    modules = []
    for block in BLOCKS[page]:
        if block.language in RUNS and block.not_run is None:
            if block.title is None:
                code = block.code.replace(*FEWER_IMAGES).splitlines()
                lines[block.line - 1 : block.line - 1 + len(code)] = code
            elif block.title.endswith(".py"):
                modules.append(f"import {block.title.removesuffix('.py')}")
    return "\n".join([*lines, *modules, ""])


def test_blocks_have_a_language():
    wrong = [str(block) for page in BLOCKS.values() for block in page if block.language not in LANGUAGES]
    assert not wrong, f"write ```LANGUAGE, one of {', '.join(LANGUAGES)}: {', '.join(wrong)}"


@pytest.mark.parametrize("block", blocks("text"))
def test_text_hides_no_code(block):
    assert not re.search(r"^(\$ |kdpipe [a-z-]+ |uv |import |from \w+ import|\[\[?\w+\]\]?$)", block.code, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("page", list(filter(has_python, BLOCKS)), ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    script = tmp_path / f"{page.stem.replace('-', '_')}_page.py"
    script.write_text(script_of(page))
    process = WarmProcess([str(script)], {**environment(), "PYTHONPATH": PYTHONPATH, "MPLBACKEND": "agg"})
    _, errors = process.communicate(timeout=300)
    assert process.wait() == 0, f"lines are those of {page}\n{errors[-4000:]}"


def test_blocks_that_cannot_run_are_counted():
    not_run = [block for page in BLOCKS.values() for block in page if block.not_run is not None]
    for block in not_run:
        compile(block.code, str(block), "exec")
    if not_run:
        reasons = "; ".join(f"{block} ({block.not_run})" for block in not_run)
        pytest.skip(f"{len(not_run)} blocks are not run: {reasons}")


@pytest.mark.parametrize("block", blocks("toml"))
def test_toml_is_a_recipe_or_part_of_one(block, tmp_path, monkeypatch):
    table = tomllib.loads(block.code)
    if block.title not in OTHER_TOML:
        write_files(block.page, tmp_path)
        monkeypatch.chdir(tmp_path)
        parse_recipe(merged(MINIMAL, table), str(block))


def merged(base: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """Return a table with the keys of both; those of the second take precedence."""
    common = {key: merged(base[key], table[key]) for key in base.keys() & table if isinstance(table[key], dict)}
    return {**base, **table, **common}


@pytest.mark.parametrize("block", blocks("json"))
def test_json_parses(block):
    json.loads(block.code)


@pytest.mark.parametrize("block", blocks("bash"))
def test_shell_commands_are_valid(block, capsys):
    done = subprocess.run(["bash", "-n"], check=False, input=block.code, capture_output=True, text=True)
    assert not done.stderr
    for line in block.code.replace("\\\n", " ").splitlines():
        tokens = shell_tokens(line)
        for name in filter(OUR_FILE.fullmatch, tokens):
            assert (ROOT / name).exists(), f"there is no {name}"
        for arguments in kdpipe_arguments(tokens):
            check_command(arguments)


def shell_tokens(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def kdpipe_arguments(tokens: list[str]) -> Iterator[list[str]]:
    """Yield the arguments of each kdpipe command among the tokens of a line."""
    while tokens and re.fullmatch(r"[A-Z_]+=.*", tokens[0]):
        tokens = tokens[1:]
    for index, token in enumerate(tokens):
        if token == "kdpipe" and (index == 0 or tokens[index - 1] in BEFORE_A_COMMAND):
            rest = tokens[index + 1 :]
            end = next((place for place, word in enumerate(rest) if END_OF_COMMAND.fullmatch(word)), len(rest))
            yield rest[:end]


def check_command(arguments: list[str]) -> None:
    """Parse a command line with kdpipe's own parser, without running it, and its overrides with those of a recipe."""
    command, context = typer.main.get_command(app), None
    while True:
        for parameter in command.params:
            parameter.callback = None  # --version would exit, --install-completion would install
        context = command.make_context(command.name, arguments, parent=context)
        if not hasattr(command, "resolve_command"):
            break
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        _, command, arguments = command.resolve_command(context, rest)
    if overrides := context.params.get("set_"):
        recipe = ROOT / context.params.get("recipe", "")
        overrides = sweep_overrides(overrides) if command.name == "sweep" else overrides
        load_recipe(recipe if recipe.is_file() else ROOT / "recipes/digits.toml", overrides)


@pytest.mark.parametrize(
    "arguments",
    [["trian"], ["run"], ["run", "r.toml", "--sett", "a=1"], ["run", "r.toml", "--set", "seeed=1"], ["store", "inf"]],
)
def test_the_check_finds_wrong_commands(arguments):
    with pytest.raises(Exception, match=r"(?i)no such|missing|unknown key"):
        check_command(arguments)
