"""What torch's ONNX exporter compiles anew for each export, its operators as ONNX functions, once for a whole process.

That takes almost half of the time of exporting a small network, and always comes to the same: a process of its own,
which compiles them itself, writes the very same bytes (tests/end_to_end/test_killed.py compares them).
"""

from __future__ import annotations

import contextlib
import functools


def keep_one_registry(*, compiled: bool = False) -> None:
    """Compile them for the first export alone, or, with `compiled`, at once: for what is forked from this process.

    Another version of torch may have them elsewhere: its exports take their time then, and nothing else changes.
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
