"""Determinism on CUDA: equal runs on one kind of GPU give equal bytes, as they always do on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.deterministic


def set_deterministic(device: torch.device) -> Callable[[], None]:
    """Let torch use kernels with a fixed order of sums on a GPU; return what restores the settings before.

    cuDNN tries no other algorithms, and backward passes use no atomic additions; operations without such a kernel
    warn, in torch's words. Call it before anything computes on CUDA, as cuBLAS reads its workspace's size only once.
    """
    if device.type != "cuda":
        return lambda: None
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn = torch.backends.cudnn
    filling: Any = torch.utils.deterministic  # its setting has no type
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before = cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory

    def restore() -> None:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory = before

    torch.use_deterministic_algorithms(True, warn_only=not enabled or warns)  # a user who wants errors keeps them
    cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory = True, False, False
    return restore
