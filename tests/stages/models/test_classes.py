"""Networks of more classes than the data: lists of class names, and the rows that are kept."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.models.build import ModelConfig, build_model
from kdpipe.stages.models.classes import build_for_classes, read_class_list
from kdpipe.stages.models.libraries.torchvision import published_categories
from kdpipe.stages.models.user_models import MODELS

SHAPE: dict[str, Any] = {"in_channels": 1, "image_size": (8, 8), "seed": 0}
KNOWN = ("ant", "bee", "tabby cat", "dog")


@pytest.fixture
def names(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(KNOWN) + "\n")
    return str(tmp_path / "names.txt")


def test_rows_of_the_data_classes_are_kept(tmp_path, names):
    whole = build_model(ModelConfig(name="cnn", args={"width": 2}), num_classes=4, **SHAPE).eval()
    save_file(whole.state_dict(), tmp_path / "net.safetensors")
    config = ModelConfig(name="cnn", args={"width": 2}, weights=str(tmp_path / "net.safetensors"), classes=names)
    said: list[str] = []
    model = build_for_classes(config, ["Dog", "tabby_cat"], **SHAPE, notify=said.append)
    images = torch.rand(3, 1, 8, 8)
    assert model.training
    assert torch.allclose(model.eval()(images), whole(images)[:, [3, 2]], atol=1e-6)
    assert said == ["cnn keeps 2 of its 4 classes: Dog is 3, tabby_cat is 2."]
    plain = build_model(ModelConfig(name="cnn", args={"width": 2}), num_classes=2, **SHAPE)
    plain.load_state_dict(model.state_dict())  # it is an ordinary network of two classes


def test_all_classes_in_another_order(names):
    config = ModelConfig(name="cnn", args={"width": 2})
    whole = build_model(config, num_classes=4, **SHAPE).eval()
    model = build_for_classes(ModelConfig(**{**vars(config), "classes": names}), KNOWN[::-1], **SHAPE).eval()
    images = torch.rand(3, 1, 8, 8)
    assert torch.allclose(model(images), whole(images).flip(1), atol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (["dog", "cow", "hen"], r"2 of the data's 3 classes are not among the 4 of .*names.txt: cow, hen. It has ant"),
        (["dog", "Dog"], "the data's classes dog, Dog are the same class"),
    ],
)
def test_classes_that_do_not_match_are_named(names, wanted, sentence):
    with pytest.raises(RecipeError, match=sentence):
        build_for_classes(ModelConfig(name="cnn", classes=names), wanted, **SHAPE)


def test_classes_of_one_name_are_refused(tmp_path):
    (tmp_path / "names.txt").write_text("crane\nbee\ncrane\n")
    config = ModelConfig(name="cnn", classes=str(tmp_path / "names.txt"))
    with pytest.raises(RecipeError, match=r"several classes 'crane', \[0, 2\]"):
        build_for_classes(config, ["crane"], **SHAPE)


def test_other_heads_are_refused(names, monkeypatch):
    monkeypatch.setattr(MODELS, "_registered", {})
    MODELS.register("scaled")(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ModelError, match="scaled does not end in one linear layer or convolution of 4"):
        build_for_classes(ModelConfig(name="scaled", classes=names), ["ant"], **SHAPE)


@pytest.mark.parametrize(
    ("name", "text", "first"),
    [
        ("a.txt", "n01440764 tench, Tinca tinca\n", ("n01440764", "tench", "Tinca tinca", "tench, Tinca tinca")),
        ("a.txt", "n01440764\ttench\n", ("n01440764", "tench")),
        ("a.txt", "great white shark\n", ("great white shark",)),
        ("a.json", json.dumps({"1": ["n01443537", "goldfish"], "0": ["n01440764", "tench"]}), ("n01440764", "tench")),
        (
            "a.json",
            json.dumps({"id2label": {"0": "tench, Tinca tinca"}}),
            ("tench", "Tinca tinca", "tench, Tinca tinca"),
        ),
        ("a.json", json.dumps({"pretrained_cfg": {"label_names": ["n01440764"]}}), ("n01440764",)),
    ],
)
def test_lists_of_classes(tmp_path, name, text, first):
    (tmp_path / name).write_text(text)
    assert read_class_list(ModelConfig(name="cnn", classes=str(tmp_path / name)))[0] == first


def test_published_classes():
    config = ModelConfig(name="resnet18", weights="published", classes="published")
    assert read_class_list(config)[0] == ("tench",)
    assert len(published_categories("torchvision:resnet18")) == 1000
    with pytest.raises(RecipeError, match="'published' is for published weights"):
        read_class_list(ModelConfig(name="cnn", classes="published"))
    with pytest.raises(RecipeError, match="is no list of class names"):
        read_class_list(ModelConfig(name="cnn", classes="absent.txt"))
