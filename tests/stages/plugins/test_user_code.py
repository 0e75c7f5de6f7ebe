from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.plugins.user_code import import_callable, source_sha256

ONE = """
import own_two
def early(): return own_two.OWNER
def late():
    import own_three
    return own_three.OWNER
"""


def value_of(reference: str) -> object:
    """What the function of a reference returns."""
    return import_callable(f"python:{reference}", "key", RecipeError)()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder; what is imported from it is forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_user_code_imports_its_modules_at_any_time(here: Path) -> None:
    (here / "own_one.py").write_text(ONE)
    for name in ("own_two", "own_three"):
        (here / f"{name}.py").write_text("OWNER = 'user'")
    assert value_of("own_one:early") == "user"
    assert value_of("own_one:late") == "user"


CARELESS = """
import os, torch
os.chdir("/")
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.set_grad_enabled(False)
torch.set_num_threads(torch.get_num_threads() + 1)
def who(): return 'user'
"""


def test_user_code_changes_no_settings(here: Path) -> None:
    def settings() -> list[object]:
        return [
            Path.cwd(), torch.get_default_dtype(), torch.empty(0).device, torch.is_grad_enabled(),
            torch.get_num_threads(),
        ]  # fmt: skip

    before = settings()
    (here / "own_one.py").write_text(CARELESS)
    assert value_of("own_one:who") == "user"
    assert settings() == before


def test_the_current_folder_follows_installed_packages(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "own_one.py").write_text("def who(): return 'user'")
    libraries, checkout = str(here / "site-packages"), str(here / "checkout")
    for entries in ([*sys.path, libraries, checkout], [checkout]):
        monkeypatch.setattr(sys, "path", list(entries))
        for _ in range(2):
            value_of("own_one:who")
        wanted = [*entries[:-1], str(here), checkout] if libraries in entries else [checkout, str(here)]
        assert sys.path == wanted


@pytest.mark.parametrize("name", ["statistics", "symtable"], ids=["imported", "not imported"])
def test_a_module_named_like_a_library_is_the_users(here: Path, name: str) -> None:
    assert (name in sys.modules) == (name == "statistics")
    (here / f"{name}.py").write_text(f"import {name}\ndef who(): return 'user'\ndef other(): return {name}.__file__")
    assert value_of(f"{name}:who") == "user"
    assert value_of(f"{name}:other") != str(here / f"{name}.py")  # every other import finds Python's
    assert not hasattr(statistics, "who")


def test_a_package_named_like_a_library_imports_itself(here: Path) -> None:
    (here / "json").mkdir()
    (here / "json" / "__init__.py").write_text("from .inside import who")
    (here / "json" / "inside.py").write_text("def who(): return 'user'")
    assert value_of("json:who") == value_of("json.inside:who") == "user"


def test_equal_names_in_two_folders_are_two_modules(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("a", "b"):
        (here / folder).mkdir()
        (here / folder / "own_nets.py").write_text(f"def who(): return {folder!r}")
    for folder in ("a", "b", "a"):
        monkeypatch.chdir(here / folder)
        assert value_of("own_nets:who") == folder
    assert source_sha256("python:own_nets:who", "key", RecipeError)


def test_a_module_on_the_path_is_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "elsewhere").mkdir()
    (here / "elsewhere" / "own_far.py").write_text("def who(): return 'far'")
    monkeypatch.syspath_prepend(here / "elsewhere")
    assert value_of("own_far:who") == "far"


def test_a_failed_import_can_be_repeated(here: Path) -> None:
    (here / "colorsys.py").write_text("1 / 0")
    for _ in range(2):
        with pytest.raises(RecipeError, match=r"the module colorsys cannot be imported \(ZeroDivisionError"):
            value_of("colorsys:who")
