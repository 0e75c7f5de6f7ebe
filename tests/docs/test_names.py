"""The documentation, the command line and the Python API list the same things."""

from __future__ import annotations

import json
import re

import typer
from support.kdpipe_process import kdpipe_here
from support.paths import ROOT

import kdpipe.losses
from kdpipe.pipeline.main import app
from kdpipe.stages.losses.registry import LOSSES

FIRST_CELL = re.compile(r"^\| `(?P<name>[^`]+)` \|", re.MULTILINE)


def rows_of(page: str, header: str) -> list[str]:
    """The names in the first column of the table with this header."""
    table = (ROOT / page).read_text().partition(f"\n{header}\n")[2].partition("\n\n")[0]
    return FIRST_CELL.findall(table)


def test_docs_commands_and_api_list_the_same_losses():
    documented = rows_of("docs/losses.md", "| loss | minimizes | weight | required of the teacher |")
    listed = [loss["name"] for loss in json.loads(kdpipe_here("losses", "--json").stdout)["losses"]]
    assert documented == list(LOSSES.builtin) == listed[: len(documented)]
    for kind in LOSSES.builtin.values():
        assert getattr(kdpipe.losses, kind.__name__) is kind
        assert kind.__name__ in kdpipe.losses.__all__


def test_readme_lists_every_command():
    documented = " ".join(rows_of("README.md", "| command | description | output in the run folder |"))
    for command in {*typer.main.get_command(app).commands} - {"demo"}:  # README begins with it
        assert f"kdpipe {command}" in documented
