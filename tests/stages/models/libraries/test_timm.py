"""timm's classifiers by name: arguments, input size, weights, classes and input scaling."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest
import torch

from kdpipe.stages.errors import ModelError, RecipeError, UnknownModelError
from kdpipe.stages.models.build import ModelConfig, build_model
from kdpipe.stages.models.classes import build_for_classes
from kdpipe.stages.models.libraries.by_name import (
    class_names_of_weights,
    num_published_classes,
    preprocessing_of_weights,
    scaling_of_weights,
)
from kdpipe.stages.models.weights.state_dict import weights_sha256

timm = pytest.importorskip("timm")

VIT = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k"
TINY: dict[str, Any] = {"depth": 1, "patch_size": 8, "embed_dim": 24}
SHAPE: dict[str, Any] = {"in_channels": 3, "image_size": (16, 16), "seed": 0}


def no_network(*_args: object, **_kwargs: object) -> None:
    raise OSError("no network")


def test_a_vit_is_built_for_the_images_size():
    config = ModelConfig(name=VIT, args=TINY)
    model, again = (build_model(config, num_classes=4, **SHAPE) for _ in range(2))
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 4)
    assert weights_sha256(model) == weights_sha256(again)


def test_names_and_arguments_that_do_not_exist_are_refused():
    for config, sentence in (
        (ModelConfig(name="timm:resnet18x"), "timm has no network 'resnet18x'; did you mean 'resnet18'"),
        (ModelConfig(name="timm:resnet18.foo"), "no weights 'foo' of resnet18; it has a1_in1k"),
        (ModelConfig(name="timm:resnet18", args={"pretrained": True}), "args.pretrained is set by kdpipe itself"),
        (ModelConfig(name=VIT, args={"foo": 1}), "cannot be built with args .*'foo'"),
    ):
        with pytest.raises(ModelError, match=sentence):
            build_model(config, num_classes=4, **SHAPE)
    assert issubclass(UnknownModelError, ModelError)


def test_weights_that_cannot_be_fetched_are_named(monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_network)
    config = ModelConfig(name="timm:resnet18.a1_in1k", weights="published")
    with pytest.raises(ModelError, match=r"fetch model.safetensors of https://huggingface.co/timm/resnet18.a1_in1k"):
        build_model(config, num_classes=4, **SHAPE)


def test_published_weights_of_other_classes_get_a_new_head(monkeypatch):
    whole = timm.create_model("vit_tiny_patch16_224", img_size=16, **TINY)
    state = whole.state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
    said: list[str] = []
    config = ModelConfig(name=VIT, args=TINY, weights="published")
    model = build_model(config, num_classes=4, **SHAPE, notify=said.append)
    assert torch.equal(model.state_dict()["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc1.weight"])
    assert said == [
        f"the published weights of {VIT} are of 1,000 classes, the data has 4: the classifier is new, drawn from the "
        "seed."
    ]
    chosen = ModelConfig(name=VIT, args=TINY, weights="published", classes="published")
    rows = build_for_classes(chosen, ["church", "n01440764"], **SHAPE)
    assert torch.equal(rows.state_dict()["head.weight"], state["head.weight"][[497, 0]])


def test_what_the_weights_state():
    names = class_names_of_weights(VIT, {})
    assert len(names) == num_published_classes(VIT, {}) == 1000
    assert names[0] == ("n01440764", "tench", "Tinca tinca")
    [(where, scaling)] = scaling_of_weights(VIT, 3).items()
    assert where == "timm's configuration of the network"
    assert scaling.mean == scaling.std == (0.5, 0.5, 0.5)
    assert scaling_of_weights(VIT, 1) == {}


@pytest.mark.parametrize(
    ("name", "made"),
    [
        (VIT, ((224, 224), 0.9, "bicubic")),
        ("timm:tf_efficientnet_b3", ((300, 300), 0.904, "bicubic")),
        ("resnet18", ((224, 224), 0.875, "bilinear")),
        ("efficientnet_v2_s", ((384, 384), 1.0, "bilinear")),
        ("cnn", (None, None, None)),
    ],
)
def test_weights_state_how_their_images_are_made(name, made):
    assert astuple(preprocessing_of_weights(name)) == made


def test_classes_in_another_order_are_refused():
    reversed_names = [names[0] for names in class_names_of_weights(VIT, {})][::-1]
    with pytest.raises(RecipeError, match=r"class 0 of the data is 'n15075141', which is output 999 .*'published'"):
        build_for_classes(ModelConfig(name=VIT, weights="published"), reversed_names, **SHAPE)
