"""Keep what torch's exporters make of a network, for all test processes: an export takes longer than a small training.

Only equal networks share an export: of the same code, structure, weights and settings. Tests of the exporters
themselves, and cold processes, export as users do.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = "TESTS_EXPORTS"
"""The environment variable that names the folder of all test processes."""

FIXED_CODE = ("torch", "kdpipe", "collections", "builtins")
"""Packages whose code stays the same during the tests."""


class _Hasher(pickle.Pickler):
    """Pickle an object with tensors as hashes of their bytes, and hash the code of tests and plugins in it."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.order: dict[int, int] = {}
        """Position by storage, because a network with tied weights is another one."""
        self.files: set[str] = set()

    def persistent_id(self, thing: Any) -> Any:
        if not isinstance(thing, torch.Tensor):
            return None
        position = self.order.setdefault(thing.untyped_storage().data_ptr(), len(self.order))
        raw = thing.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if thing.numel() else b""
        kind = (type(thing).__name__, str(thing.dtype), tuple(thing.shape), thing.stride())
        return (*kind, position, hashlib.sha256(raw).hexdigest())

    def reducer_override(self, thing: Any) -> Any:
        module = sys.modules.get(getattr(thing, "__module__", None) or "builtins")
        if module is not None and module.__name__.partition(".")[0] not in FIXED_CODE:
            self.files.add(module.__file__ or "")
        return NotImplemented


def key_of(*things: Any) -> str | None:
    """Return a hash that differs for different networks and settings; None for what cannot be told."""
    hasher = _Hasher(content := io.BytesIO())
    try:
        hasher.dump(things)
        code = [Path(file).read_bytes() for file in sorted(hasher.files)]
    except Exception:  # lambdas, local classes, open files
        return None
    return hashlib.sha256(b"\0".join([content.getvalue(), *code])).hexdigest()


def kept(kind: str, make: Callable[..., bytes]) -> Callable[..., bytes]:
    """Return `make` with its results on disk."""

    def made(*arguments: Any) -> bytes:
        if (key := key_of(kind, *arguments)) is None:
            return make(*arguments)
        path = Path(os.environ[FOLDER]) / key
        try:
            return path.read_bytes()
        except FileNotFoundError:
            content = make(*arguments)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_bytes(content)
            partial.replace(path)
            return content

    return made


def keep_exports() -> None:
    """Replace both exporters of this process, and of those forked from it."""
    import onnx

    from kdpipe.stages.export import onnx_export, torch_export

    if hasattr(torch_export._exported, "__wrapped__"):
        return
    to_onnx = onnx_export._to_onnx
    as_bytes = kept("onnx", lambda *given: to_onnx(*given).SerializeToString())
    onnx_export._to_onnx = functools.wraps(to_onnx)(lambda *given: onnx.ModelProto.FromString(as_bytes(*given)))
    torch_export._exported = functools.wraps(torch_export._exported)(kept("pt2", torch_export._exported))
