"""Run the command line in its own process, on a recipe that takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner, Result

from kdpipe.pipeline.main import app
from kdpipe.pipeline.terminal.output import Verbosity, set_verbosity
from support.device import DEVICE
from support.warm_process import WarmProcess

NO_CHECK = "import sys; sys.modules['pynvml'] = None"
"""Tests share one GPU. In a container their processes would not know each other in the driver's list of its users."""

COMMAND = [sys.executable, "-c", f"{NO_CHECK}; from kdpipe.pipeline.entry import main; main()"]

RECIPE = """
# Command: kdpipe run tiny.toml. Hardware: any. Time: seconds. Expect: a done run.
name = "tiny"
device = "DEVICE"
num_threads = 1
data = { name = "digits", num_train = 200 }
views = { num_views = 30, operations = [{ name = "RandomCrop", padding = 1 }] }
cache = { batch_size = 64 }

[teacher]
model = { name = "cnn", args = { width = 8 } }
train = { epochs = 6, batch_size = 32, checkpoint_every_s = 0 }

[student]
model = { name = "cnn", args = { width = 4 } }
train = { epochs = 6, batch_size = 32, checkpoint_every_s = 0 }
seeds = [0]

[[distill]]
loss = "kd"

[[distill]]
loss = "hint"
layers = [["stage2", "stage2"]]
weight = 0.5

[compress]
baselines = false
niceness = 0
prune = { ratio = 0.25, round_to = 1 }
prune_train = { epochs = 4, batch_size = 32, lr = 0.02, checkpoint_every_s = 0 }
quantize_train = { epochs = 4, batch_size = 32, lr = 0.002, checkpoint_every_s = 0 }
latency_rounds = 3
""".replace("DEVICE", str(DEVICE))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def kdpipe_cold(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `kdpipe` to its end as a user does: in a new Python process, which takes seconds to import everything."""
    process = start_cold(*arguments)
    out, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.wait(), out, errors)


def kdpipe(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `kdpipe` to its end, in its own process, forked from one with warm imports."""
    process = start(*arguments)
    out, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.wait(), out, errors)


def kdpipe_here(*arguments: str | Path) -> Result:
    """Run the command line in this process."""
    set_verbosity(Verbosity.NORMAL)  # as main() does: an earlier call with refused options leaves it changed
    return CliRunner().invoke(app, list(map(str, arguments)))


def start(*arguments: str | Path, **variables: str) -> WarmProcess:
    """Start `kdpipe` with further variables in its environment, and return its process."""
    return WarmProcess(["kdpipe", *map(str, arguments)], environment() | variables)


def start_cold(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start `kdpipe` in a new Python process."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def signal_when(process: WarmProcess | subprocess.Popen[str], ready: Callable[[], bool], number: int) -> None:
    """Send a signal to the process as soon as `ready`; fails if it ends first."""
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, f"it ended before it could be stopped: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
