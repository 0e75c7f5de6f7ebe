"""Tests of what surrounds a command."""

from __future__ import annotations

import os
import subprocess
import sys

from support.paths import PYTHONPATH

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
