"""Networks that users bring: by name, as jobs and stores identify them, and as teachers with weights of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_run import CACHE, STUDENT, TEACHER, TRAIN, tiny_context
from torch import nn

from kdpipe.pipeline.steps import cache_teacher, train_student, train_teacher
from kdpipe.stages.compress.artifacts.load import rebuild
from kdpipe.stages.compress.external_student import load_external
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.errors import ModelError, RecipeError, UnknownModelError
from kdpipe.stages.models.build import ModelConfig, architecture, build_model, list_models
from kdpipe.stages.models.user_models import MODELS
from kdpipe.stages.runtime.events import ProgressEvent, RunMonitor
from kdpipe.stages.teacher import TeacherConfig, load_teacher, teacher_identity
from kdpipe.store import FingerprintMismatch

pytestmark = pytest.mark.usefixtures("without_onnx")

NETS = """
import torch
from torch import nn
from own_layers import activation

def net(num_classes, image_size, width=4):
    pixels = image_size[0] * image_size[1]
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), activation(), nn.Linear(width, num_classes))

def trained(num_classes, image_size):
    model = net(num_classes, image_size)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.25)
    return model
"""
LAYERS = "from torch import nn\ndef activation(): return nn.ReLU()\n"


def forget() -> None:
    """Forget the user's modules, as a new process does."""
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the modules own_nets and own_layers; nothing is registered."""
    (tmp_path / "own_nets.py").write_text(NETS)
    (tmp_path / "own_layers.py").write_text(LAYERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(MODELS, "_registered", {})
    yield tmp_path
    forget()


@pytest.fixture
def edit(here: Path) -> Callable[[str], None]:
    """Edit a module of the user's between two processes."""

    def append(name: str) -> None:
        (here / name).write_text((here / name).read_text() + "# edited\n")
        forget()

    return append


def own(factory: str = "net", **keys: Any) -> TeacherConfig:
    given = {"mean": (0.3,), "std": (0.2,), "expected_accuracy": 0.0}  # it returns the same for each image
    return TeacherConfig(model=ModelConfig(name=f"python:own_nets:{factory}"), **(given | keys))


def register() -> Callable[..., nn.Module]:
    @MODELS.register("my_net")
    def my_net(num_classes: int, in_channels: int, image_size: tuple[int, int], scale: float = 1.0) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size[0] * image_size[1], num_classes))

    return my_net


# --- Identity


@pytest.mark.parametrize("edited", ["own_nets.py", "own_layers.py"])
def test_an_edited_teacher_is_not_mixed_into_its_store(here: Path, edit: Callable[[str], None], edited: str) -> None:
    context = tiny_context(here / "run")
    train_teacher(own("trained"), 0, context)
    cache_teacher(CACHE, here / "store", load_teacher(own("trained"), 0, context), [], context)
    edit(edited)
    with pytest.raises(FingerprintMismatch, match=r"architecture\.source_sha256: stored '.*', wanted .* was edited"):
        train_teacher(own("trained"), 0, context)
    other = tiny_context(here / "other", views=replace(context.views, num_views=4))
    train_teacher(own("trained"), 0, other)
    teacher = load_teacher(own("trained"), 0, other)
    with pytest.raises(FingerprintMismatch, match="The source of the user's code, or of a module that it imports"):
        cache_teacher(CACHE, here / "store", teacher, [], other)


def test_a_teacher_is_identified_without_building_it(here: Path) -> None:
    context = tiny_context(here / "run")
    train_teacher(own("trained"), 0, context)
    found = teacher_identity(own("trained"), context)
    assert found == load_teacher(own("trained"), 0, context).identity
    assert len(found["architecture"]["source_sha256"]) == 64


def test_an_edited_student_is_not_resumed(here: Path, edit: Callable[[str], None]) -> None:
    context, student = tiny_context(here / "run"), replace(STUDENT, model=own().model)
    done = train_student(student, 0, None, context)
    assert train_student(student, 0, None, context) == done
    edit("own_layers.py")
    with pytest.raises(FingerprintMismatch, match="source_sha256"):
        train_student(student, 0, None, context)


def test_an_edited_network_is_rebuilt_with_a_warning(
    here: Path, edit: Callable[[str], None], recwarn: pytest.WarningsRecorder
) -> None:
    context, student = tiny_context(here / "run"), replace(STUDENT, model=own().model)
    train_student(student, 0, None, context)
    (file,) = (here / "run").rglob("model.safetensors")
    first = rebuild(file, trust_python=True)
    assert not [each for each in recwarn if "edited" in str(each.message)]
    fresh = build_student(student, 0, context, ())
    assert load_external(file, fresh, context.train_set.class_names).identity == first.identity
    edit("own_nets.py")
    with pytest.warns(UserWarning, match="the source of python:own_nets:net, or of a module .* was edited"):
        assert rebuild(file, trust_python=True).identity == first.identity
    with pytest.raises(FingerprintMismatch, match="source_sha256"):
        load_external(file, build_student(student, 0, context, ()), context.train_set.class_names)


def test_a_built_in_network_has_no_source() -> None:
    assert "source_sha256" not in architecture(ModelConfig(name="cnn"), 10, 1, (8, 8))
    assert "source_sha256" not in architecture(ModelConfig(name="resnet18"), 10, 3, (32, 32))


def test_a_network_without_source_is_refused(here: Path) -> None:
    with pytest.raises(ModelError, match="later edits of its source could not be noticed"):
        architecture(ModelConfig(name="python:builtins:print"), 10, 1, (8, 8))


# --- Teachers that bring their weights


def test_a_teacher_may_bring_its_weights(here: Path) -> None:
    reported: list[ProgressEvent] = []
    result = train_teacher(own("trained"), 0, tiny_context(here / "run", RunMonitor(reported.append)))
    assert result["identity"]["weights_sha256"]
    assert "python:own_nets:trained brings its own weights: it is not trained" in [event.job for event in reported]


def test_a_teacher_with_random_weights_is_refused(here: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"python:own_nets:net has random weights, .*: give teacher\.model\.weights or"
    ):
        train_teacher(own(), 0, tiny_context(here / "run"))
    assert not (here / "run").exists()


def test_a_built_in_teacher_needs_weights_or_training(here: Path) -> None:
    with pytest.raises(RecipeError, match=r"neither \[teacher\.train\] nor teacher\.model\.weights"):
        train_teacher(replace(TEACHER, train=None), 0, tiny_context(here / "run"))


# --- Registered networks


def test_a_registered_network_trains_and_is_rebuilt(here: Path) -> None:
    register()
    context = tiny_context(here / "run")
    train_teacher(TeacherConfig(model=ModelConfig(name="my_net", args={"scale": 2}), train=TRAIN), 0, context)
    (file,) = (here / "run").rglob("model.safetensors")
    network = rebuild(file)
    assert network.architecture["model"] == "my_net"
    assert len(network.architecture["source_sha256"]) == 64
    assert network.model(torch.zeros(1, 1, 8, 8)).shape == (1, 4)


def test_an_unregistered_network_is_named(here: Path) -> None:
    register()
    train_teacher(TeacherConfig(model=ModelConfig(name="my_net"), train=TRAIN), 0, tiny_context(here / "run"))
    (file,) = (here / "run").rglob("model.safetensors")
    MODELS._registered.clear()
    with pytest.raises(ModelError, match="its model is 'my_net', a registered one: import the module"):
        rebuild(file)


def test_registered_networks_are_listed_and_suggested() -> None:
    register()
    assert list_models()[0] == "my_net"
    with pytest.raises(UnknownModelError, match="no model is called 'mynet'; did you mean 'my_net'"):
        build_model(ModelConfig(name="mynet"), num_classes=2, in_channels=1, image_size=(8, 8), seed=0)


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_a_built_in_network_cannot_be_replaced(name: str) -> None:
    with pytest.raises(RecipeError, match=f"a model called '{name}'"):
        MODELS.register(name)(nn.Identity)
