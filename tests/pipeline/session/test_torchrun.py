"""kdpipe-torchrun exits with the status of its processes, also after a signal."""

import signal
import subprocess
import sys

import pytest
from support.kdpipe_process import environment, signal_when

from kdpipe.pipeline.session.torchrun import status_of

PROCESS = """
import os, pathlib, signal, sys, time

asked = []
signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
while not asked:
    time.sleep(0.01)
sys.exit(75)
"""


def test_signals_are_forwarded_and_status_75_is_returned(tmp_path):
    (tmp_path / "process.py").write_text(PROCESS)
    own = ["--nproc-per-node", "2", str(tmp_path / "process.py"), str(tmp_path)]
    command = [sys.executable, "-m", "kdpipe.pipeline.session.torchrun", *own]
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
        ([-15, 75], True, 75),  # still starting
        ([-15, 75], False, 143),
        ([1, -9], False, 137),  # one was killed, the other failed for lack of it
        ([75, 1], True, 1),
        ([1, 12], False, 12),
        ([2, 2], False, 2),
    ],
)
def test_status_of_several_processes(codes, asked_to_stop, status):
    assert status_of(codes, asked_to_stop=asked_to_stop) == status
