"""OpenVINO: convert an ONNX file to its IR, and run the IR on the CPU."""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.runtime.versions import require_library
from kdpipe.store.fs.checksums import write_with_sum

if TYPE_CHECKING:
    import numpy as np

METADATA = "kdpipe"
"""The key of the IR's `rt_info` under which it has the ONNX file's metadata."""

TYPES = {"f32": "tensor(float)", "f64": "tensor(double)"}


def export_openvino(onnx: Path, path: Path) -> None:
    """Write the IR of an ONNX file, `path` (.xml) and the weights beside it (.bin), byte-identical each time.

    The metadata are in `rt_info`, below "kdpipe". Raises ModelError if OpenVINO is absent, or cannot convert it.
    """
    require_library("openvino", path.name)
    import openvino
    from onnx import load

    try:
        network = openvino.Core().read_model(str(onnx))
        # Automatic names count on from one conversion of a process to the next.
        for number, operation in enumerate(network.get_ordered_ops()):
            kind = operation.get_type_name()
            if re.fullmatch(rf"{re.escape(kind)}_\d+", operation.get_friendly_name()):
                operation.set_friendly_name(f"{kind}_{number}")
        for entry in load(onnx, load_external_data=False).metadata_props:
            network.set_rt_info(entry.value, [METADATA, entry.key])
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "model.xml"
            openvino.serialize(network, str(written))
            write_with_sum(path.with_suffix(".bin"), written.with_suffix(".bin").read_bytes())
            write_with_sum(path, written.read_bytes())
    except RuntimeError as error:
        raise ModelError(f"OpenVINO cannot convert {onnx}: {cause(error)}") from error


class OpenvinoSession:
    """A compiled IR on the CPU, with the part of onnxruntime's interface that `Session` has.

    It computes in float32 where it does not in INT8: OpenVINO's own choice would be bfloat16 on CPUs that have it.
    """

    def __init__(self, path: Path, num_threads: int | None = None) -> None:
        require_library("openvino", path.name)
        if not path.is_file():
            raise ModelError(f"there is no OpenVINO IR at {path}.")
        import openvino

        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if num_threads:
            settings |= {"INFERENCE_NUM_THREADS": num_threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
        try:
            with kept_signal_stack():
                self.network = openvino.Core().compile_model(str(path), "CPU", settings)
        except RuntimeError as error:
            raise ModelError(f"OpenVINO cannot load {path}: {cause(error)}") from error
        self.request = self.network.create_infer_request()

    def get_inputs(self) -> list[SimpleNamespace]:
        """Return the inputs; a side of any length is None."""
        found = []
        for port in self.network.inputs:
            kind = port.element_type.get_type_name()
            shape = [None if side.is_dynamic else side.get_length() for side in port.partial_shape]
            found.append(SimpleNamespace(name=port.any_name, type=TYPES.get(kind, f"tensor({kind})"), shape=shape))
        return found

    def run(self, output_names: Sequence[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return copies of the outputs."""
        results = self.request.infer(dict(feed))
        return [results[name] for name in output_names or [port.any_name for port in self.network.outputs]]


class SignalStack(ctypes.Structure):
    """`stack_t` of Linux: the memory in which a thread runs its signal handlers, if not its own stack."""

    _fields_ = (("memory", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Give this thread back the signal stack that it has now.

    OpenVINO's CPU plugin sets one of its own, and frees it with the network. If two networks are freed in the order in
    which they were compiled, the thread is left with freed memory, and the next signal ends the process.
    """
    libc, before = ctypes.CDLL(None), SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
