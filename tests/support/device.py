"""The device that tests compute on: pytest's option --device, which conftest.py puts into the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

VARIABLE = "TESTS_DEVICE"

DEVICE = torch.device(os.environ.get(VARIABLE, "cpu"))

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs --device cuda")


@contextmanager
def without_waits() -> Iterator[None]:
    """Raise an error where the host would wait for a GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def needs_cpu(reason: str) -> pytest.MarkDecorator:
    """Skip a test on other devices than the CPU."""
    return pytest.mark.skipif(DEVICE.type != "cpu", reason=f"on the CPU only: {reason}")
