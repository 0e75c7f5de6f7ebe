"""Fixtures that several rooms' tests use."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on a busy machine two threads mostly wait for each other
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime else calls its makers, from a thread of its own

from collections.abc import Callable
from pathlib import Path

import pytest
from made_store import MadeStore, make_store


@pytest.fixture
def store_maker(tmp_path: Path) -> Callable[..., MadeStore]:
    return lambda name="a.zarr", **settings: make_store(tmp_path / name, **settings)


@pytest.fixture
def made(tmp_path: Path) -> MadeStore:
    return make_store(tmp_path / "made.zarr")
