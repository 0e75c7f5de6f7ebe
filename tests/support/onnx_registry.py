"""Cache the operators that torch's ONNX exporter compiles for each export, almost half of the time of a small one.

The result is always the same: a new process, which compiles them itself, writes the same bytes.
"""

from __future__ import annotations

import contextlib
import functools


def cache_onnx_registry(*, compiled: bool = False) -> None:
    """Compile the operators only for the first export, or at once with `compiled`, for processes forked from this one.

    Does nothing if another version of torch has moved them.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from torch.onnx._constants import ONNX_DEFAULT_OPSET
        from torch.onnx._internal.exporter import _registration

        registry, operators = _registration.ONNXRegistry, _registration.onnxscript_apis
        if not hasattr(registry.from_torchlib, "cache_info"):
            registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))  # one for each opset
            operators.get_torchlib_ops = functools.cache(operators.get_torchlib_ops)  # one for all of them
        if compiled:
            registry.from_torchlib(opset_version=ONNX_DEFAULT_OPSET)
