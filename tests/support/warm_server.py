"""Fork processes with warm imports, which take longer than the tests: `python warm_server.py SOCKET_FD`.

Arguments that begin with `kdpipe` run the command line, those that begin with a file name the script.

A fork has its own pid, arguments, environment, working folder and output, Python's signal handlers and exit status. It
ends with os._exit, as in multiprocessing, because tearing down the imported modules takes even longer.

The server computes nothing, because forks lose threads; if it has a thread nevertheless, forks start a new Python. All
test processes use one server, which ends when the last of them has closed its connection.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

from support.empty_charts import save_empty
from support.export_cache import keep_exports
from support.onnx_registry import cache_onnx_registry

MAX_BYTES = 1 << 17
"""Size limit of a request on the socket."""

EARLY_IMPORTS = (
    "kdpipe.pipeline.main",
    "kdpipe.pipeline.steps",
    "kdpipe.pipeline.commands.summary",
    "kdpipe.pipeline.report.report",
)
LATE_IMPORTS = (
    "onnxscript.function_libs.torch_lib.ops",
    "kdpipe.pipeline.commands.variants.compare",
    "kdpipe.pipeline.commands.generations",
    "kdpipe.pipeline.commands.search.search",
    "kdpipe.pipeline.commands.variants.sweep",
    "kdpipe.pipeline.recipe.planned_jobs",
    "kdpipe.pipeline.report.html.write",
    "kdpipe.pipeline.report.pareto",
    "kdpipe.pipeline.session.event_log",
    "kdpipe.pipeline.session.run_record",
    "kdpipe.pipeline.terminal.reporter",
    "kdpipe.pipeline.terminal.whole_run",
    "kdpipe.stages.compress.artifacts.load",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "matplotlib.style",
    "onnxruntime",
    "rich.progress",
    "rich.table",
    "sklearn.datasets",
    "sympy.combinatorics",
    "sympy.tensor.tensor",
    "torch._inductor.fx_utils",
    "torch.export._trace",
    "torch.onnx._internal.exporter._core",
    "torch.onnx._internal.exporter._torchlib.ops",
    "torch_pruning",
    "torchvision.transforms.v2",
    "typer._adapters",
)
"""Modules imported while commands run. Names missing in another version of a library are skipped."""


def warm_up() -> None:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # telemetry would start a thread
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's allocator, which sklearn imports, too
    sys.modules["pynvml"] = None  # type: ignore[assignment] # as kdpipe_process.NO_CHECK says
    gc.disable()
    for name in EARLY_IMPORTS:
        importlib.import_module(name)
    for name in LATE_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    cache_onnx_registry(compiled=True)
    keep_exports()
    sys.modules["matplotlib.figure"].Figure.savefig = save_empty  # type: ignore[attr-defined]
    gc.freeze()  # keep the garbage collector of forks from scanning it
    gc.enable()


def serve(listening: socket.socket) -> None:
    """Fork a process for each request, until all clients are gone."""
    has_threads = len(list(Path("/proc/self/task").iterdir())) > 1
    reports: dict[int, tuple[int, int]] = {}
    """By pidfd of a running process: its pid, and the descriptor for its exit status."""
    num_clients = 0
    with selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd in reports:
                    selector.unregister(key.fd)
                    report_end(key.fd, *reports.pop(key.fd))
                elif key.fileobj is listening:
                    selector.register(listening.accept()[0], selectors.EVENT_READ)
                    num_clients += 1
                elif (received := socket.recv_fds(key.fileobj, MAX_BYTES, 3))[0]:  # type: ignore[arg-type]
                    request, fds = json.loads(received[0]), received[1]
                    if (pid := os.fork()) == 0:
                        open_ones = [selector.fileno(), *selector.get_map(), *(to for _, to in reports.values())]
                        become(request, fds, open_ones, has_threads)
                    watched = report_start(pid, fds)
                    reports[watched] = (pid, fds[2])
                    selector.register(watched, selectors.EVENT_READ)
                else:
                    selector.unregister(key.fileobj)
                    num_clients -= 1
                    if not num_clients:
                        return


def report_start(pid: int, fds: list[int]) -> int:
    """Send its pid, close its output here, and return its pidfd."""
    send(fds[2], pid)
    for fd in fds[:2]:
        os.close(fd)
    return os.pidfd_open(pid)


def report_end(watched: int, pid: int, report: int) -> None:
    send(report, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os.close(watched)
    os.close(report)


def send(report: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the client has ended
        os.write(report, b"%d\n" % number)


def become(request: dict[str, Any], fds: list[int], of_server: list[int], has_threads: bool) -> NoReturn:
    """Become the requested process, which writes to `fds`; with `has_threads`, as a new Python."""
    os.dup2(fds[0], 1)
    os.dup2(fds[1], 2)
    for fd in (*fds, *of_server):
        os.close(fd)
    os.chdir(request["cwd"])
    arguments, environment = request["arguments"], request["environment"]
    if has_threads:
        code = f"import sys; sys.argv[:] = {arguments!r}; from kdpipe.pipeline.entry import main; main()"
        command = arguments if arguments[0].endswith(".py") else ["-c", code]
        os.execve(sys.executable, [sys.executable, *command], environment)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = arguments
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[:1] = ["", *added]  # instead of this file's folder
    run_to_the_end()


def run_to_the_end() -> NoReturn:
    """Run `kdpipe` or the script, and end as Python does, except for the teardown of modules."""
    from kdpipe.pipeline.entry import main

    status = 0
    try:
        if sys.argv[0].endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
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
