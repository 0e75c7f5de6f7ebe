"""A tiny run to compress, and its compressed student."""

import pytest
from support.tiny_compression import compressed, copied, exported
from support.tiny_run import STUDENT, make_tiny_store, open_tiny_spec, tiny_context

from kdpipe.pipeline.steps import train_student


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Create a run folder with a teacher, its store, and a distilled student; read-only."""
    folder = tmp_path_factory.mktemp("compress")
    context = tiny_context(folder)
    make_tiny_store(context)
    train_student(STUDENT, 0, open_tiny_spec(folder / "store.zarr", context), context)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return copied(run, tmp_path)


@pytest.fixture(scope="session")
def made(run, tmp_path_factory):
    """Create a run with a student pruned, quantized and exported; read-only."""
    folder = copied(run, tmp_path_factory.mktemp("made"))
    compressed(folder, run)
    exported(folder, run)
    return folder


@pytest.fixture
def own(made, tmp_path):
    """Return a copy of `made`."""
    return copied(made, tmp_path)
