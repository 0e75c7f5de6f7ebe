"""Forks `kdpipe` processes for the tests that have already imported what the command line imports, which takes a fresh
one longer than all that it is asked to do: `python warm_server.py FD`, where FD is a socket for requests.

A process that it forks is a real one: with a pid, arguments, environment, working folder and output of its own, with
signals as Python sets them, and ended by them or with the status that Python would give it. Only its last moment is not
Python's: all that was imported is left to the kernel, as multiprocessing does, for to take it down takes longer still.

The server itself computes nothing, for a thread would be lost in a fork; where it has one all the same, its forks start
Python anew. It ends when nobody is left who could ask it for anything.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import selectors
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

from one_registry import keep_one_registry

MOST_BYTES = 1 << 17
"""Of a request: a longer message such a socket may not carry."""

IMPORTED_LATE = (
    "onnxscript.function_libs.torch_lib.ops",
    "pipeline.commands.compare",
    "pipeline.commands.generations",
    "pipeline.report.pareto",
    "sklearn.datasets",
    "sympy.combinatorics",
    "torch.export._trace",
    "torch.onnx._internal.exporter._core",
    "torch.onnx._internal.exporter._torchlib.ops",
    "torchmetrics.functional.classification",
    "torchvision.transforms.v2",
)
"""By commands under way. A name that another version does not have any more costs time, and nothing else."""


def warm_up() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as pipeline.main does, before torch is imported
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # else onnxruntime starts a thread
    gc.disable()
    for name in ("pipeline.main", "pipeline.run", "pipeline.commands.summary", "pipeline.report.report", "pipeline.store_app"):
        importlib.import_module(name)
    for name in IMPORTED_LATE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    keep_one_registry(compiled=True)
    gc.freeze()  # the forks need not look through all that
    gc.enable()


def serve(requests: socket.socket) -> None:
    """Fork a process for each request, until there can be no more."""
    afresh = len(list(Path("/proc/self/task").iterdir())) > 1
    reports: dict[int, tuple[int, int]] = {}
    """By pidfd, of what runs: the pid, and where to say how it ended."""
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not requests:
                    selector.unregister(key.fd)
                    tell_end(key.fd, *reports.pop(key.fd))
                    continue
                said, fds, _, _ = socket.recv_fds(requests, MOST_BYTES, 3)
                if not said:
                    return
                if (pid := os.fork()) == 0:
                    of_server = [selector.fileno(), requests.fileno(), *reports, *(to for _, to in reports.values())]
                    become(json.loads(said), fds, of_server, afresh)
                watched = begun(pid, fds)
                reports[watched] = (pid, fds[2])
                selector.register(watched, selectors.EVENT_READ)


def begun(pid: int, fds: list[int]) -> int:
    """Say so, and leave its output to it. Returns its pidfd."""
    tell(fds[2], pid)
    for fd in fds[:2]:
        os.close(fd)
    return os.pidfd_open(pid)


def tell_end(watched: int, pid: int, report: int) -> None:
    tell(report, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os.close(watched)
    os.close(report)


def tell(report: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # who asked has ended meanwhile
        os.write(report, b"%d\n" % number)


def become(request: dict[str, Any], fds: list[int], of_server: list[int], afresh: bool) -> NoReturn:
    """Be the process that is asked for, which writes to `fds`. With `afresh`, start Python anew for it."""
    os.dup2(fds[0], 1)
    os.dup2(fds[1], 2)
    for fd in (*fds, *of_server):
        os.close(fd)
    os.chdir(request["cwd"])
    arguments, environment = request["arguments"], request["environment"]
    if afresh:
        code = f"import sys; sys.argv[:] = {arguments!r}; from pipeline.main import main; main()"
        os.execve(sys.executable, [sys.executable, "-c", code], environment)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = arguments
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[:1] = ["", *added]  # in the place of this file's folder
    run_to_the_end()


def run_to_the_end() -> NoReturn:
    """Run `kdpipe`, and end as Python does, up to its last moment."""
    from pipeline.main import main

    status = 0
    try:
        main()
    except SystemExit as asked:
        status = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    warm_up()
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
