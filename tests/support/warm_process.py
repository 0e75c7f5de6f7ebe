"""A Popen-like handle of the `kdpipe` processes that warm_server.py forks."""

from __future__ import annotations

import fcntl
import functools
import io
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.export_cache import FOLDER
from support.paths import PYTHONPATH, TESTS


class WarmProcess:
    """A `kdpipe` process in the current working folder; its output is read by `communicate`."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.args = list(arguments)
        self.returncode: int | None = None
        request = {"arguments": self.args, "environment": dict(environment), "cwd": str(Path.cwd())}
        pipes = [os.pipe() for _ in range(3)]
        socket.send_fds(_server(), [json.dumps(request).encode()], [written for _, written in pipes])
        for _, written in pipes:
            os.close(written)
        *self._outputs, self._report = [io.FileIO(read) for read, _ in pipes]
        self.pid = self._read_number()

    def _read_number(self) -> int:
        """Wait for the next number from the server."""
        line = self._report.readline()
        if not line:
            raise RuntimeError("the server of warm processes has ended: see stderr.")
        return int(line)

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        return self.wait(0) if self._has_ended(0) else None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not self._has_ended(timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._read_number()
            self._report.close()
        return self.returncode

    def _has_ended(self, timeout: float | None) -> bool:
        return self.returncode is not None or _readable([self._report], timeout) != []

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return stdout and stderr, after all writers have closed them and the process has ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        output_of = dict.fromkeys(self._outputs, b"")
        while open_ones := [output for output in self._outputs if not output.closed]:
            ready = _readable(open_ones, None if deadline is None else max(0.0, deadline - time.monotonic()))
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            for output in ready:
                output_of[output] += (part := output.read(1 << 16))
                if not part:
                    output.close()
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        out, errors = (output_of[output].decode() for output in self._outputs)
        return out, errors

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _readable(files: Sequence[io.FileIO], timeout: float | None) -> list[Any]:
    with selectors.DefaultSelector() as selector:
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(timeout)]


@functools.cache
def _server() -> socket.socket:
    """Return a connection to the server of all test processes, which the first of them starts."""
    place = Path(os.environ[FOLDER]) / "server"
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            connection.connect(str(place))
        except (FileNotFoundError, ConnectionRefusedError):
            place.unlink(missing_ok=True)
            _start_server(place)
            connection.connect(str(place))
    return connection


def _start_server(place: Path) -> None:
    command = [sys.executable, str(TESTS / "support" / "warm_server.py")]
    path = os.pathsep.join([PYTHONPATH, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(place))
        listening.listen()
        fd = listening.fileno()
        _started.append(subprocess.Popen([*command, str(fd)], env=environment, stdin=subprocess.DEVNULL, pass_fds=[fd]))


_started: list[subprocess.Popen[bytes]] = []
"""Kept, because a forgotten Popen warns."""
