"""A tiny recipe, and a run of it that nothing disturbed: one for all processes that share these tests between them."""

import fcntl
import os

import pytest
from kdpipe_process import RECIPE, kdpipe_afresh


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def done(tmp_path_factory, recipe):
    """A run that nothing disturbed, and what it said on stdout. Others read it too: it has to stay as it is.

    It was made as users make theirs; what processes that started warm make is compared with it.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "undisturbed"
    folder.mkdir(exist_ok=True)
    run, said = folder / "run", folder / "said"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            ended = kdpipe_afresh("run", recipe, "--run", run)
            assert ended.returncode == 0, ended.stderr
            said.write_text(ended.stdout)
    return run, said.read_text()
