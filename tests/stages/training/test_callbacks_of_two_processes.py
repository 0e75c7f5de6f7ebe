"""Callbacks of two processes that train together: only the first calls them, and both stop.

The test runs this file as a script: its processes are forks, of one that has used neither threads nor autograd.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from support.tiny_run import STUDENT, TRAIN, tiny_context
from support.two_processes import run_two_processes

from kdpipe.stages.errors import RunError
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.runtime.callbacks import Callback, CallbackState
from kdpipe.stages.runtime.distributed import ProcessGroup, init_distributed
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.task import TrainingTask


class Stopper(Callback):
    """Asks to stop at the third step."""

    num_calls = 0

    def on_step_end(self, state: CallbackState) -> None:
        self.num_calls += 1
        if state.global_step == 3:
            state.stop()


class Broken(Callback):
    """Fails at the third step."""

    def on_step_end(self, state: CallbackState) -> None:
        if state.global_step == 3:
            raise ValueError("no disk")


def train_as(rank: int, folder: Path, port: str) -> None:
    """Train as one of the two processes; write what it found to RANK.json."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    stopper, error = Stopper(), ""
    with init_distributed(os.environ) as processes:
        history = train_with(stopper, folder / "stopped", processes)
        try:
            train_with(Broken(), folder / "failed", processes)
        except RunError as caught:
            error = str(caught)
    found = {"stopped_by": [line.get("stopped_by") for line in history], "num_calls": stopper.num_calls, "error": error}
    (folder / f"{rank}.json").write_text(json.dumps(found))


def train_with(callback: Callback, folder: Path, processes: ProcessGroup) -> list[dict[str, Any]]:
    """Train the tiny student on its labels; return the metrics of its epochs."""
    folder.mkdir(exist_ok=True)
    context = tiny_context(folder)
    task = TrainingTask(context.train_loader, 1, Normalization((0.5,), (0.5,)), fresh_views=True)
    model = context.build_model(STUDENT.model, 0)
    job = TrainJob("test", "test", model, task, None, TRAIN, 0, JobDir(folder), process_group=processes)
    return train(job, context.device, RunMonitor(callbacks=(callback,)))


def main(folder: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    child = os.fork()
    train_as(int(child == 0), folder, port)
    if child:
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def test_two_processes_stop_together(tmp_path: Path) -> None:
    first, second = run_two_processes(__file__, tmp_path)
    assert first["stopped_by"] == ["Stopper"]
    assert (first.pop("num_calls"), second.pop("num_calls")) == (9, 0)
    assert first == second
    assert "the callback Broken failed in on_step_end (ValueError: no disk)" in first["error"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
