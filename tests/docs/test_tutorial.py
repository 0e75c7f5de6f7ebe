"""Every command of the tutorial runs, in its order and in one folder, on fewer photos and for fewer epochs."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
from support.kdpipe_process import environment
from support.markdown import code_blocks
from support.paths import PYTHONPATH, ROOT
from support.warm_process import WarmProcess

LESS = {
    "python examples/shapes.py": ["--train", "12", "--test", "8", "--epochs", "5"],
    "kdpipe recipe new": ["--student", "cnn"],
    "kdpipe bench": ["--rounds", "3"],
}
SHORT = {
    "KDPIPE_VIEWS__NUM_VIEWS": "1",
    "KDPIPE_STUDENT__SEEDS": "[0]",
    "KDPIPE_STUDENT__TRAIN__EPOCHS": "1",
    "KDPIPE_STUDENT__TRAIN__WARMUP_EPOCHS": "0",
    "KDPIPE_COMPRESS__PRUNE_TRAIN__EPOCHS": "1",
    "KDPIPE_COMPRESS__QUANTIZE_TRAIN__EPOCHS": "1",
    "KDPIPE_COMPRESS__BASELINES": "false",
    "KDPIPE_COMPRESS__LATENCY_ROUNDS": "3",
}


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [block.code.replace("\\\n", "") for block in code_blocks(ROOT / "docs" / "tutorial.md")]
    lines = [line for block in blocks for line in block.splitlines()]
    ended = {line: run(shlex.split(line)) for line in lines}
    assert not [one.stderr[-500:] for one in ended.values() if one.returncode]
    assert (tmp_path / "runs" / "mine" / "report.html").exists()
    assert "circle" in next(one.stdout for line, one in ended.items() if "predict.py" in line)


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command as users do, or, where it takes torch, in a process that has imported it."""
    environ = {**environment(), **SHORT, "PYTHONPATH": PYTHONPATH}
    words = [*words, *(word for start, more in LESS.items() if shlex.join(words).startswith(start) for word in more)]
    if words[0] == "python" and words[1].startswith("runs/"):
        return subprocess.run(
            [sys.executable, *words[1:]], check=False, env=environ, capture_output=True, text=True, timeout=300
        )
    process = WarmProcess(words if words[0] == "kdpipe" else [str(ROOT / words[1]), *words[2:]], environ)
    out, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(words, process.wait(), out, errors)
