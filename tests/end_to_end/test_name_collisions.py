"""A user's store.py, stages.py and pipeline.py work beside kdpipe, whose folders have these names too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.kdpipe_process import environment
from support.paths import ROOT

NAMES = ("store", "stages", "pipeline", "support", "config", "run", "losses", "models", "datasets", "plugins")
FACTORY = """
import pipeline, store
from kdpipe.stages.models.networks.mlp import mlp

def tiny(num_classes, in_channels, image_size, **settings):
    assert store.OWNER == pipeline.OWNER == "user"
    return mlp(num_classes=num_classes, in_channels=in_channels, image_size=image_size, hidden=[4])
"""
RECIPE = """
# Command: kdpipe modules tiny.toml. Hardware: any. Time: seconds. Expect: the layers of both networks.
name = "tiny"
data = { name = "digits" }
teacher = { model = { name = "python:own_networks:tiny" }, train = { epochs = 1 } }
student = { model = { name = "mlp", args = { hidden = [16] } } }
distill = [{ loss = "kd" }]
"""


@pytest.fixture(params=["PYTHONPATH", "current folder"])
def run_beside(request, tmp_path, monkeypatch):
    """Return a function that runs a command which finds the user's modules on PYTHONPATH, or where it is started."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text('OWNER = "user"\n')
    (tmp_path / "own_networks.py").write_text(FACTORY)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "elsewhere").mkdir()
    is_on_path = request.param == "PYTHONPATH"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*([str(tmp_path)] if is_on_path else []), str(ROOT)]))
    monkeypatch.chdir(tmp_path / "elsewhere" if is_on_path else tmp_path)
    return lambda *command: subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


def test_python_imports_both(run_beside):
    code = (
        "import store, stages, pipeline, config, kdpipe.pipeline.main, kdpipe.stages.errors, kdpipe.store\n"
        "assert {module.OWNER for module in (store, stages, pipeline, config)} == {'user'}\n"
        "assert kdpipe.store.StoreError and kdpipe.store is not store; print('both')"
    )
    ended = run_beside(sys.executable, "-c", code)
    assert ended.stdout == "both\n", ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("run_beside", ["current folder"], indirect=True)
def test_a_factory_imports_its_own_store_py(run_beside, tmp_path):
    # As an installed `kdpipe` does: neither the current folder nor the sources are at the head of the path.
    code = f"import sys; from kdpipe.pipeline.main import main; sys.path.remove({str(ROOT)!r}); main()"
    ended = run_beside(sys.executable, "-P", "-c", code, "modules", str(tmp_path / "tiny.toml"), "--json")
    assert ended.returncode == 0, ended.stderr
    assert '"command": "modules"' in ended.stdout
