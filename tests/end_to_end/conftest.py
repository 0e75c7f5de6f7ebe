"""A tiny recipe, and an uninterrupted run of it, shared by all test processes."""

import fcntl
import os
import shutil

import pytest
from support.kdpipe_process import RECIPE, kdpipe_cold


@pytest.fixture(autouse=True)
def _without_charts(without_charts):
    """Forks of warm processes draw none either; the cold one of `done` does."""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def done(tmp_path_factory, recipe):
    """Return an uninterrupted run and its stdout. Do not modify it: other tests compare their runs with it.

    It runs in a new Python, as for users, to be compared with runs of warm processes.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "undisturbed"
    folder.mkdir(exist_ok=True)
    run, output = folder / "run", folder / "output.txt"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            ended = kdpipe_cold("run", recipe, "--run", run)
            assert ended.returncode == 0, ended.stderr
            shutil.copy(run / "compressed" / "pareto.svg", folder)  # reports of other tests draw it again, empty
            output.write_text(ended.stdout)
    return run, output.read_text()
