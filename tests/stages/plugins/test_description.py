"""What counts of a notebook's code, of closures, and of network objects."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.notebook import Notebook
from torch import nn

from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.plugins.user_source import network_sha256, object_sha256

LOSS = """
def loss(student, teacher, *, margin=1.0):
    def inner(logits):
        return helper(logits) * SCALE
    return inner(student) - inner(teacher)
"""
HELPER = "def helper(logits): return logits.abs()"


def digest(found: Any) -> str:
    return object_sha256(found, "x", RecipeError)


@pytest.fixture
def notebook() -> Notebook:
    book = Notebook(torch=torch, nn=nn)
    for cell in ("SCALE = 2", HELPER, LOSS):
        book.run(cell)
    return book


# --- Notebooks


@pytest.mark.parametrize(
    ("cells", "counts"),
    [
        (["SCALE = 3"], True),
        (["SCALE = [1, 2]"], True),
        (["import math as SCALE"], True),
        ([HELPER.replace("abs", "relu")], True),
        (["from torch.nn.functional import relu as helper"], True),
        ([LOSS.replace("inner(student)", "student")], True),
        (["K = 2.0", LOSS.replace("1.0", "K"), "K = 3.0"], False),
        (["SCALE = 2", HELPER, "\n\n" + LOSS], False),
        (["other = 3", "student = 4", "abs = 5", "def margin(): ..."], False),
    ],
)
def test_what_a_function_names_counts(notebook: Notebook, cells: list[str], counts: bool) -> None:
    for cell in cells[:-1]:
        notebook.run(cell)
    before = digest(notebook["loss"])
    notebook.run(cells[-1])
    assert (digest(notebook["loss"]) != before) == counts


def test_default_of_an_unchanged_cell_counts(notebook: Notebook) -> None:
    digests = []
    for cell in ("K = 2.0", "K = 3.0"):
        notebook.run(cell)
        notebook.run(LOSS.replace("1.0", "K"))
        digests.append(digest(notebook["loss"]))
    assert digests[0] != digests[1]


def test_counters_and_logs_are_no_constants(notebook: Notebook) -> None:
    notebook.run("""
        calls, log = 0, []
        def make():
            own, seen = 0, []
            def counted():
                global calls
                nonlocal own
                calls += 1
                own += 1
                log.append(calls)
                seen.append(own)
            return counted
        counted = make()
    """)
    before = digest(notebook["counted"])
    notebook["counted"]()
    assert digest(notebook["counted"]) == before


def test_helpers_of_helpers_and_circles_count(notebook: Notebook) -> None:
    notebook.run("def helper(logits): return deep(logits)")
    notebook.run("def deep(logits): return loss if SCALE else logits")
    before = digest(notebook["loss"])
    notebook.run("def deep(logits): return loss if SCALE else -logits")
    assert digest(notebook["loss"]) != before


def test_a_class_without_methods_counts_by_its_attributes(notebook: Notebook) -> None:
    digests = []
    for base, scale in (("nn.ReLU", 1), ("nn.ReLU", 2), ("nn.GELU", 1), ("nn.ReLU", 1)):
        notebook.run(f"class Own({base}):\n    scale = {scale}")
        digests.append(digest(notebook["Own"]))
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


def test_code_without_text_is_refused() -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec("class Own:\n    def forward(self): ...", names)
    with pytest.raises(RecipeError, match="later edits of its source could not be noticed"):
        digest(names["Own"])


# --- Closures


def made(value: Any) -> Callable[[], Any]:
    def function() -> Any:
        return value

    return function


class Color(Enum):
    RED = 1
    BLUE = 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1.0, 1000.0),
        (1, 1.0),
        ("a", "b"),
        (None, False),
        ([1, {"a": (2,)}], [1, {"a": (3,)}]),
        ({1, 2}, {1, 3}),
        (torch.float16, torch.float32),
        (torch.tensor([1.0]), torch.tensor([2.0])),
        (np.ones(2), np.ones(3)),
        (Color.RED, Color.BLUE),
        (torch.relu, torch.tanh),
        (np.tanh, np.exp),
        (made(1), made(2)),
        (functools.partial(made, 1), functools.partial(made, 2)),
        (SimpleNamespace(scale=1), SimpleNamespace(scale=2)),
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
        (lambda: 1, lambda: 2),
    ],
)
def test_values_of_closures_count(one: Any, other: Any) -> None:
    assert digest(made(one)) == digest(made(copy.deepcopy(one))) != digest(made(other))


def test_a_closure_that_cannot_be_described_is_refused() -> None:
    values: list[Any] = [nn.Linear(2, 3), [object()], iter([1])]
    for value in values:
        with pytest.raises(RecipeError, match=r"^x: it uses `value`, a .*, whose later changes could not be noticed"):
            digest(made(value))


def test_closures_of_methods_count() -> None:
    def make(scale: float) -> type:
        class Own(nn.ReLU):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                return images * scale

        return Own

    assert digest(make(1.0)) == digest(make(1.0)) != digest(make(2.0))


def test_state_of_a_bound_object_counts() -> None:
    class Schedule:
        def __init__(self, rate: float) -> None:
            self.rate = rate

        def __call__(self) -> float:
            return self.rate

    first, second, other = Schedule(1.0), Schedule(1.0), Schedule(2.0)
    assert digest(first) == digest(second) != digest(other)
    assert digest(first.__call__) == digest(second.__call__) != digest(other.__call__)


# --- Networks


class Scaled(nn.Module):
    """A network with plain attributes, of which `forward` changes two."""

    def __init__(self, scale: Any = 1.0) -> None:
        super().__init__()
        self.scale, self.calls = scale, 0
        self.log: list[int] = []
        self.fc = nn.Linear(2, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.log.append(self.calls)
        output: torch.Tensor = self.scale * self.fc(images)
        return output


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1.0, 50.0),
        ([1, 2], [2, 1]),
        (torch.relu, torch.tanh),
        (lambda x: x, lambda x: -x),
        (made(1), made(2)),
        (made, digest),
        (Scaled, nn.Linear),
        (SimpleNamespace(scale=1), SimpleNamespace(scale=2)),
    ],
)
def test_plain_attributes_of_a_network_count(one: Any, other: Any) -> None:
    first, second = (network_sha256(nn.Sequential(Scaled(value)))["structure_sha256"] for value in (one, other))
    assert first == network_sha256(nn.Sequential(Scaled(one)))["structure_sha256"] != second


def test_training_and_use_of_a_network_do_not_count() -> None:
    model = Scaled()
    before = network_sha256(model)
    model(torch.ones(1, 2)).sum().backward()
    with torch.no_grad():
        model.fc.weight.mul_(2)
    assert network_sha256(copy.deepcopy(model).eval()) == before


def test_buffers_outside_the_state_dict_count() -> None:
    digests = []
    for value in (1.0, 1.0, 2.0):
        model = Scaled()
        model.register_buffer("mean", torch.tensor(value), persistent=False)
        digests.append(network_sha256(model))
    assert digests[0] == digests[1] != digests[2]


def test_shared_modules_count() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert network_sha256(nn.Sequential(one, one)) != network_sha256(nn.Sequential(one, other))


def test_code_of_libraries_does_not_count() -> None:
    digests = [network_sha256(nn.Sequential(kind())) for kind in (nn.ReLU, nn.GELU)]
    assert digests[0]["source_sha256"] == digests[1]["source_sha256"]
    assert digests[0]["structure_sha256"] != digests[1]["structure_sha256"]


BLOCK = "class Block(nn.Module):\n    def forward(self, images): return images.relu()"
BASE = "class Base(nn.Module):\n    def forward(self, images): return self.block(images)"
NET = """
class Net(Base):
    def __init__(self):
        super().__init__()
        self.block = Block()
"""


@pytest.mark.parametrize(
    "edited", [BLOCK.replace("relu", "tanh"), BASE.replace("(images)", "(-images)"), NET + "    #"]
)
def test_each_cell_of_a_network_counts(edited: str) -> None:
    book = Notebook(nn=nn)
    for cell in (BLOCK, BASE, NET):
        book.run(cell)
    before = network_sha256(book["Net"]())["source_sha256"]
    book.run(edited)
    book.run(NET if edited[:9] != NET[:9] else NET + "    x = 1")
    assert network_sha256(book["Net"]())["source_sha256"] != before


def test_a_network_without_source_is_refused() -> None:
    names: dict[str, Any] = {"__name__": "__main__", "nn": nn}
    exec("class Own(nn.Module):\n    def forward(self, images): ...", names)
    with pytest.raises(ModelError, match="the network Sequential: later edits of its source could not be noticed"):
        network_sha256(nn.Sequential(names["Own"]()))
