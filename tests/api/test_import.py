"""`import kdpipe`: cheap, and what it offers."""

import doctest
import importlib
import subprocess
import sys

import pytest

import kdpipe as kd
from kdpipe import losses
from kdpipe.losses import functional

HEAVY = ("torch", "numpy", "zarr", "pydantic", "typer", "rich", "matplotlib")

FACES = [kd, losses, functional]


def test_import_costs_no_heavy_package():
    script = f"import sys, kdpipe, kdpipe.losses; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


@pytest.mark.parametrize("face", FACES, ids=lambda face: face.__name__)
def test_every_name_exists_and_is_listed(face):
    for name in face.__all__:
        assert getattr(face, name) is not None, name
    assert set(face.__all__) <= set(dir(face))
    with pytest.raises(AttributeError, match="no attribute"):
        _ = face.no_such_name


def test_type_checkers_see_what_is_imported():
    assert set(kd._SOURCES) | {"__version__", "losses"} == set(kd.__all__)


@pytest.mark.parametrize("name", sorted(set(kd.__all__) - {"__version__", "losses"}))
def test_every_public_object_has_a_docstring(name):
    assert (getattr(kd, name).__doc__ or "").strip()


@pytest.mark.parametrize("module", ["datasets", "models", "teachers", "students", "compression", "reports"])
def test_examples_in_docstrings_run(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = importlib.import_module(f"kdpipe.{module}")
    assert doctest.testmod(found, optionflags=doctest.ELLIPSIS).failed == 0
