"""TF32: whether CUDA's float32 convolutions and matrix products round their inputs to 10 bits of mantissa."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def tf32(*, enabled: bool) -> Iterator[None]:
    """Compute float32 convolutions, recurrent layers and matrix products on CUDA with TF32, or exactly, in the block.

    torch's default is TF32 for convolutions only. CPUs have no TF32: there nothing changes.
    """
    restore = _switch(enabled)
    try:
        yield
    finally:
        restore()


def _switch(enabled: bool) -> Callable[[], None]:
    """Set the switches; return what restores them."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        before = cudnn.allow_tf32, matmul.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # the user's code has used the newer settings, with which the older ones must not be mixed
        return _switch_operations(enabled)
    cudnn.allow_tf32 = matmul.allow_tf32 = enabled  # the older ones, as torch.compile reads them

    def restore() -> None:
        cudnn.allow_tf32, matmul.allow_tf32 = before[:2]
        torch.set_float32_matmul_precision(before[2])

    return restore


def _switch_operations(enabled: bool) -> Callable[[], None]:
    backends: Any = torch.backends  # its settings of single operations have no types
    operations = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before = [operation.fp32_precision for operation in operations]
    for operation in operations:
        operation.fp32_precision = "tf32" if enabled else "ieee"

    def restore() -> None:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision

    return restore
