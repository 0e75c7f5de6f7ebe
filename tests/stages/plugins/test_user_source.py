from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from torch import nn

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.plugins.user_code import import_callable, object_sha256, source_sha256

FILES = {
    "own_net.py": "import torch, own_a\nfrom own_b import WIDTH\ndef net():\n    from own_pack.deep import DEPTH\n",
    "own_a.py": "import own_net",  # a circle
    "own_b.py": "WIDTH = 3",
    "own_pack/__init__.py": "from . import other",
    "own_pack/deep.py": "DEPTH = 2",
    "own_pack/other.py": "",
    "own_idle.py": "",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with FILES; what is imported from it is forgotten at the end."""
    (tmp_path / "own_pack").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    forget()


def forget() -> None:
    """Forget what was imported, as a new process does."""
    for name in [name for name in sys.modules if name.startswith(("own_", "_user_"))]:
        del sys.modules[name]


def digest(reference: str = "own_net:net") -> str:
    return source_sha256(f"python:{reference}", "model.name", RecipeError)


@pytest.mark.parametrize("name", FILES)
def test_an_edit_of_what_is_imported_counts(here: Path, name: str) -> None:
    before = digest()
    forget()
    assert digest() == before
    forget()
    (here / name).write_text(FILES[name] + "\n# edited")
    assert (digest() == before) == (name == "own_idle.py")


def test_calling_the_function_does_not_change_the_digest() -> None:
    before = digest()
    import_callable("python:own_net:net", "key", RecipeError)()
    assert "own_pack.deep" in sys.modules
    assert digest() == before


def test_the_digest_of_one_file_is_that_of_its_bytes(here: Path) -> None:
    (here / "own_b.py").write_text("import math, torch\ndef net(): ...")
    assert digest("own_b:net") == hashlib.sha256((here / "own_b.py").read_bytes()).hexdigest()


def test_an_edit_after_the_import_is_a_warning(here: Path) -> None:
    before = digest()
    (here / "own_b.py").write_text("WIDTH = 4")
    with pytest.warns(UserWarning, match=r"own_b.py was edited after it was imported"):
        assert digest() == before
    importlib.reload(sys.modules["own_b"])
    assert digest() != before


def test_an_object_of_a_librarys_class_counts_with_its_module(here: Path) -> None:
    (here / "own_b.py").write_text("from torch import nn\nnet = nn.Identity()")
    before = digest("own_b:net")
    forget()
    (here / "own_b.py").write_text("from torch import nn\nnet = nn.Flatten()")
    assert digest("own_b:net") != before


def test_the_name_of_a_renamed_module_does_not_count(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for folder in ("one", "two"):
        (here / folder / "json").mkdir(parents=True)
        (here / folder / "json" / "__init__.py").write_text("from .net import net")
        (here / folder / "json" / "net.py").write_text("def net(): ...")
        monkeypatch.chdir(here / folder)
        digests.append(digest("json:net"))
    assert digests[0] == digests[1]


def test_libraries_are_not_followed() -> None:
    file = Path(sys.modules[nn.Linear.__module__].__file__ or "")
    assert object_sha256(nn.Linear, "x", RecipeError) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_partial_alone_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"x: later edits of a functools\.partial could not be noticed"):
        object_sha256(partial(digest, "a"), "x", RecipeError)


def test_built_in_code_is_refused() -> None:
    with pytest.raises(RecipeError, match="later edits of its source could not be noticed"):
        digest("sys:exc_info")
