"""torchrun's exit status, for batch systems: that of the processes, also where a signal has stopped them."""

import signal
import subprocess
import sys

import pytest
from kdpipe_process import environment, signal_when

from pipeline.session.torchrun import status_of

PROCESS = """
import os, pathlib, signal, sys, time

asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
while not asked:
    time.sleep(0.01)
sys.exit(75)
"""


def test_a_signal_goes_on_to_the_processes_and_their_75_comes_back(tmp_path):
    (tmp_path / "process.py").write_text(PROCESS)
    own = ["--nproc-per-node", "2", str(tmp_path / "process.py"), str(tmp_path)]
    command = [sys.executable, "-m", "pipeline.session.torchrun", *own]
    job = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    signal_when(job, lambda: all((tmp_path / rank).exists() for rank in "01"), signal.SIGINT)
    errors = job.communicate(timeout=60)[1]
    assert job.returncode == 75
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("codes", "asked_to_stop", "status"),
    [
        ([75, 75], True, 75),
        ([75, 75], False, 75),  # --max-duration
        ([-15, 75], True, 75),  # it had not begun
        ([-15, 75], False, 143),
        ([1, -9], False, 137),  # one was killed, the other lost it
        ([75, 1], True, 1),
        ([1, 12], False, 12),
        ([2, 2], False, 2),
    ],
)
def test_the_status_says_what_went_wrong_first(codes, asked_to_stop, status):
    assert status_of(codes, asked_to_stop=asked_to_stop) == status
