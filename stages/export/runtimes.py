"""Open an exported file in the runtime that it is for: onnxruntime, OpenVINO for its IR, ExecuTorch for its program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kdpipe.stages.export.onnx_session import open_session, session_options

if TYPE_CHECKING:
    import numpy as np

LIBRARIES = {".onnx": "onnxruntime", ".xml": "openvino", ".pte": "executorch"}
"""The library that runs a file, by its suffix; one without a known suffix is an ONNX file."""


class Session(Protocol):
    """A loaded network, with the part of onnxruntime's interface that is used here."""

    def get_inputs(self) -> Sequence[Any]:
        """Return the inputs, each with `name`, `type` ("tensor(float)") and `shape`."""
        ...

    def run(self, output_names: Sequence[str] | None, feed: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        """Return the outputs for named inputs."""
        ...


def library_of(path: Path) -> str:
    """Return the name of the library that runs a file."""
    return LIBRARIES.get(path.suffix, "onnxruntime")


def open_file(path: Path, num_threads: int | None = None) -> Session:
    """Open an exported file on the CPU, in float32 or the integers that it has.

    With `num_threads` its threads sleep while waiting, in a run and after it. By default they spin: within a run for
    the next operation, and after it into the turn of the next file. On shared cores that distorts a measurement: on two
    busy ones, ResNet-18 at batch 16 took 90 ms and 35 ms in INT8 spinning, 49 ms and 12 ms sleeping. A single thread
    measures the same either way.

    Raises:
        ModelError: If there is no such file, its library is not installed, or cannot load it.
    """
    if library_of(path) == "openvino":
        from kdpipe.stages.export.openvino_ir import OpenvinoSession

        return OpenvinoSession(path, num_threads)
    if library_of(path) == "executorch":
        from kdpipe.stages.export.executorch_program import ExecutorchSession

        return ExecutorchSession(path, num_threads)
    options = session_options(num_threads or 0)
    if num_threads:
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session: Session = open_session(path, options)
    return session
