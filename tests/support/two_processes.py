"""Run a test file as two processes that train together, and read what each found."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.paths import PYTHONPATH


def run_two_processes(script: str, folder: Path) -> list[dict[str, Any]]:
    """Run `script`, which forks, with `folder`; return the records 0.json and 1.json that the processes leave there."""
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, str(folder)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def free_port() -> str:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return str(bound.getsockname()[1])
