"""Fixtures shared by all tests, and settings that make the suite fast."""

from __future__ import annotations

import os
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on a busy machine two threads mostly wait for each other
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # telemetry would start a thread
os.environ["KDPIPE_WORKSPACE"] = "none"  # a test's runs are its own, but in tests of sharing
os.environ["COLUMNS"] = "200"  # tables in one piece; xdist's workers have 80

import gc
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.empty_charts import save_empty
from support.export_cache import FOLDER, keep_exports
from support.made_store import MadeStore, make_store
from support.onnx_registry import cache_onnx_registry

IN_MEMORY = Path("/dev/shm")
MIN_FREE_BYTES = 4 << 30
"""Free memory required to keep the tests' folders in memory: they take less than 1 GiB, and are removed at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="the device that tests compute on: cpu or cuda:0")
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
        # Now: conftest.py of a folder on the command line is imported next, and with it support.device.
        os.environ["TESTS_DEVICE"] = full_name(parser.parse_known_args(sys.argv[1:]).device)


def full_name(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


def pytest_configure(config: pytest.Config) -> None:
    """Keep the tests' folders in memory where there is room: stores sync every file, which is slow on disks."""
    if IN_MEMORY.is_dir() and os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > MIN_FREE_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))
    if not hasattr(config, "workerinput"):  # which inherits it
        os.environ[FOLDER] = tempfile.mkdtemp(dir=os.environ.get("PYTEST_DEBUG_TEMPROOT"))
    if full_name(config.getoption("--device")) != os.environ["TESTS_DEVICE"]:
        raise pytest.UsageError("give --device on the command line itself")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in end_to_end/ as e2e."""
    for item in items:
        if "end_to_end" in item.path.parts:
            item.add_marker(pytest.mark.e2e)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Turn off the garbage collector during imports, and keep it from scanning the imported modules afterwards."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        if "kdpipe.stages.export.onnx_export" in sys.modules:
            cache_onnx_registry()
            keep_exports()


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()  # some libraries list all objects when they end
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[FOLDER], ignore_errors=True)


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write no ONNX files after trainings, for tests of something else: their export takes most of the time."""
    import kdpipe.stages.compress.artifacts.write  # noqa: F401 - has its own names of what is replaced here
    from kdpipe.stages.training import finalize, preflight

    monkeypatch.setattr(preflight, "try_export", lambda model, image_shape: None)
    monkeypatch.setattr(finalize, "export_onnx", lambda model, example, path, metadata: path.write_bytes(b"no file"))
    monkeypatch.setattr(finalize, "require_agreement", lambda path, network, test: SimpleNamespace(agreement=1.0))


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing in the charts of pages, for tests of something else."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_empty)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace networks as torch.compile does, and run the operations without compiling them."""
    from kdpipe.stages.cache_teacher import choice
    from kdpipe.stages.compute.compiled import compiled
    from kdpipe.stages.models import hooks
    from kdpipe.stages.training import set_up

    monkeypatch.setattr(hooks, "compiled", partial(compiled, backend="aot_eager"))
    for module in (choice, set_up):
        monkeypatch.setattr(module, "require_compiler", lambda device, key: None)


@pytest.fixture
def store_maker(tmp_path: Path) -> Callable[..., MadeStore]:
    return lambda name="a.zarr", **settings: make_store(tmp_path / name, **settings)


@pytest.fixture
def made(tmp_path: Path) -> MadeStore:
    return make_store(tmp_path / "made.zarr")
