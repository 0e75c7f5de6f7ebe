"""A start that fails in one process is reported by all, and a process that fails does not wait for the others.

The test runs this file as a script: its processes are forks, of one that has used neither threads nor autograd.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.two_processes import free_port, run_two_processes

from kdpipe.stages.errors import DataError, RecipeError
from kdpipe.stages.runtime.distributed import gradient_group, init_distributed, is_lost_peer
from kdpipe.stages.runtime.gpu import nccl
from kdpipe.stages.runtime.gpu.nccl import gpu_backend, words_of

PR_SET_PDEATHSIG = 1

REFUSED = "NCCL error in: /pytorch/torch/NCCLUtils.cpp:77, unhandled system error, NCCL version 2.27\nLast error:\nno"


def start_in_one(rank: int) -> str | None:
    """Start something that fails in the second process, for which the first waits without end."""

    def start() -> None:
        if rank == 1:
            raise RuntimeError(REFUSED)
        threading.Event().wait()

    return nccl._start_together(start)


def fail_while_sending(rank: int, folder: Path) -> None:
    """Fail in the first process while its gradients wait for the second, which answers no more."""
    with init_distributed(os.environ) as processes:
        processes.use_device(torch.device("cpu"))
        found = {"started": nccl._start_together(lambda: None), "failed": start_in_one(rank)}
        processes.barrier()
        (folder / f"{rank}.json").write_text(json.dumps(found))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(2), group=gradient_group(), async_op=True)
        raise DataError("an image is gone")


def main(folder: Path) -> None:
    nccl.FAREWELL_S = 0.2
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    child = os.fork()
    os.environ["RANK"] = "0" if child else "1"
    if not child:
        ctypes.CDLL(None).prctl(
            PR_SET_PDEATHSIG, signal.SIGKILL
        )  # ends when the other has: not before, as in a cluster
    with suppress(DataError):
        fail_while_sending(int(os.environ["RANK"]), folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_two_processes(__file__, tmp_path_factory.mktemp("results"))


def test_failed_start_is_reported_by_all_processes(results: list[dict[str, Any]]) -> None:
    """Then each process ends, also the one that still waits, or has gradients under way: else this is a timeout."""
    words = "in process 1 (unhandled system error, NCCL version 2.27 Last error: no)"
    assert results == [{"started": None, "failed": words}] * 2


def test_own_failure_is_told_from_the_end_of_another() -> None:
    assert not is_lost_peer(dist.DistBackendError(REFUSED))
    assert is_lost_peer(dist.DistBackendError("ncclRemoteError: A call failed possibly due to a network error"))
    assert is_lost_peer(dist.DistNetworkError("recv failed"))
    assert is_lost_peer(RuntimeError("[/gloo/tcp/pair.cc:561] Connection closed by peer"))
    assert not is_lost_peer(RuntimeError("shapes differ"))
    assert words_of(RuntimeError(" \n")) == "RuntimeError"


def test_unknown_backend_is_an_error() -> None:
    assert gpu_backend({}) == gpu_backend({"KDPIPE_DIST_BACKEND": ""}) == "nccl"
    with pytest.raises(RecipeError, match="KDPIPE_DIST_BACKEND is 'mpi': set it to 'nccl'"):
        gpu_backend({"KDPIPE_DIST_BACKEND": "mpi"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
