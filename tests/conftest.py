"""Fixtures that several rooms' tests use, and what lets thousands of tests end in minutes."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on a busy machine two threads mostly wait for each other
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime else calls its makers, from a thread of its own

import gc
import shutil
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from support.made_store import MadeStore, make_store
from support.onnx_registry import cache_onnx_registry

IN_MEMORY = Path("/dev/shm")
FREE_BYTES = 4 << 30
"""There, before it is used: all tests together leave less than one GiB in it, and pytest takes that away again."""


def pytest_configure() -> None:
    """Keep the tests' folders in memory where there is room: a store syncs every file, which a disk takes ages for."""
    if IN_MEMORY.is_dir() and os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > FREE_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage among millions of objects that imports make, which stay: not while, and not afterwards."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        if "kdpipe.stages.export.onnx_export" in sys.modules:
            cache_onnx_registry()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries look for what they have leaked, and would list all of it


@pytest.fixture
def store_maker(tmp_path: Path) -> Callable[..., MadeStore]:
    return lambda name="a.zarr", **settings: make_store(tmp_path / name, **settings)


@pytest.fixture
def made(tmp_path: Path) -> MadeStore:
    return make_store(tmp_path / "made.zarr")
