"""The commands of RESULTS.md pass as they stand: recipes, settings and options exist, those of benchmarks too."""

from __future__ import annotations

import argparse
import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support.markdown import code_blocks
from support.paths import ROOT

from kdpipe.pipeline.recipe.load import load_recipe

PAGE = ROOT / "RESULTS.md"
BENCHMARK = re.compile(r"(?:[A-Z_]+=\S+ )?(?:uv run )?(?:python )?(benchmarks/\w+\.py)(.*)")
RECIPE = re.compile(r"recipes/[\w-]+\.toml")


def commands() -> list[str]:
    """Return the lines of the page's shell blocks and its inline code, without comments."""
    blocks = [block.code.replace("\\\n", " ") for block in code_blocks(PAGE) if block.language == "bash"]
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", PAGE.read_text(), flags=re.DOTALL)
    return [*lines, *(" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose))]


BENCHMARKS = sorted({found.groups() for line in commands() if (found := BENCHMARK.fullmatch(line))})


class Parsed(Exception):
    """The options of a benchmark are valid."""


@pytest.mark.parametrize(("script", "options"), BENCHMARKS, ids=[script for script, _ in BENCHMARKS])
def test_benchmarks_take_their_options(script, options, monkeypatch, capsys):
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser) -> None:
        parse(self)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [script, *expanded(options)])
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.chdir(ROOT)
    main = runpy.run_path(script)["main"]
    if "parse_args" not in Path(script).read_text():
        assert not options.strip()
        return
    with pytest.raises(Parsed):
        main()


@pytest.mark.parametrize("line", sorted(filter(RECIPE.search, commands())))
def test_recipes_take_their_settings(line):
    words = expanded(line)
    settings = [value for option, value in itertools.pairwise(words) if option == "--set"]
    settings += [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    recipes = RECIPE.findall(line)
    assert all((ROOT / recipe).exists() for recipe in recipes)
    load_recipe(ROOT / recipes[0], settings)


def expanded(line: str) -> list[str]:
    """Return the words of a command as bash expands their braces."""
    assert not re.search(r"[$`;|&<>]", line), "these words would be run"
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], check=True, capture_output=True, text=True)
    return done.stdout.split("\0")[:-1] if line.strip() else []


def test_the_page_has_commands():
    assert len(BENCHMARKS) >= 10
