"""A tiny recipe, and a run of it that nothing disturbed."""

import pytest
from kdpipe_process import RECIPE, kdpipe


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def done(tmp_path_factory, recipe):
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = kdpipe("run", recipe, "--run", run)
    assert ended.returncode == 0, ended.stderr
    return run, ended
