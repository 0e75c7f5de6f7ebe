"""Run a test file as two processes that train together, and read what each found."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from support.paths import PYTHONPATH
from support.warm_process import WarmProcess


def run_two_processes(script: str, folder: Path) -> list[dict[str, Any]]:
    """Run `script`, which forks, with `folder`; return the records 0.json and 1.json that the processes leave there."""
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "KDPIPE_DIST_BACKEND": "gloo"}
    process = WarmProcess([script, str(folder)], environment)
    _, errors = process.communicate(timeout=120)
    assert process.wait() == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def free_port() -> str:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return str(bound.getsockname()[1])
