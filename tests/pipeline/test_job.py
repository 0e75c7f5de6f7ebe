"""Tests of what surrounds a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import PYTHONPATH

from kdpipe.pipeline import job
from kdpipe.stages.errors import RecipeError, RunError
from kdpipe.store import KdpipeError, exclusive
from kdpipe.store.fs.checksums import write_with_sum

FIRST_LINE = """
import sys
from kdpipe.pipeline import job
from kdpipe.pipeline.session.options import JobOptions
def said(line):
    print(line, "torch" in sys.modules)
    raise SystemExit
job.print_info = said
sys.stderr.isatty = lambda: True
job.run_job("run", "my.toml", JobOptions())
"""


def test_a_job_says_something_before_torch_is_loaded() -> None:
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    ended = subprocess.run(
        [sys.executable, "-c", FIRST_LINE], check=False, env=environment, capture_output=True, text=True
    )
    assert ended.stdout == "reads my.toml ... False\n", ended.stderr


@pytest.mark.parametrize("error", [RecipeError, RunError])
@pytest.mark.parametrize("made", [None, "recipe.json", "teacher"])
def test_a_refused_command_leaves_no_folder_of_records(
    made: str | None, error: type[KdpipeError], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    if made == "recipe.json":  # it was there before
        folder.mkdir()
    with pytest.raises(error), job._nothing_left_of_a_failure(folder), exclusive(folder, folder / ".kdpipe.lock"):
        write_with_sum(folder / "recipe.json", b"{}")
        for name in ("run.json", "events.jsonl", ".run.json.lock", made or "run.json"):
            (folder / name).write_text("{}")
        raise error("refused")
    assert folder.exists() == (made is not None)
