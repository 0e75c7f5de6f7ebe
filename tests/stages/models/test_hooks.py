"""Modules are found by the path that a recipe names, and a wrong path gets the nearest ones."""

from __future__ import annotations

import re

import pytest
from torch import nn

from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.build import ModelConfig, build_model
from kdpipe.stages.models.hooks import get_module


@pytest.fixture(scope="module")
def model() -> nn.Module:
    config = ModelConfig(name="resnet20")
    return build_model(config, num_classes=10, in_channels=3, image_size=(32, 32), seed=0)


def test_a_path_leads_to_its_module(model: nn.Module) -> None:
    assert get_module(model, "layer2") is model.get_submodule("layer2")
    assert get_module(model, "layer3.2.bn1") is model.get_submodule("layer3.2.bn1")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("layr3", "the model has no module 'layr3'; did you mean 'layer3'"),
        ("layer3.0.conv5", "did you mean 'layer3.0.conv"),
        ("layer3.0.conv1.weight", "did you mean 'layer3.0.conv1"),
        ("", "it has: conv1, bn1, relu, layer1, layer2, layer3, avgpool, flatten, fc."),
        ("§§§", "it has: conv1, bn1"),
    ],
)
def test_a_wrong_path_gets_the_nearest_ones(model: nn.Module, path: str, hint: str) -> None:
    with pytest.raises(ModelError, match=re.escape(hint)):
        get_module(model, path)


def test_a_shared_module_answers_to_both_its_paths() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Linear(2, 2), shared)
    assert get_module(model, "0") is get_module(model, "2")
