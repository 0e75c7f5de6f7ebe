"""Tests of what a network's outputs must be: logits, and a function of the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.build import GivenModel, ModelConfig, build_model
from kdpipe.stages.models.user_models import MODELS
from kdpipe.stages.models.weights.state_dict import weights_sha256


def build(
    name: str,
    shape: tuple[int, int, int] = (3, 32, 32),
    *,
    num_classes: int = 10,
    seed: int = 0,
    weights: str | None = None,
    notify: Callable[[str], None] = print,
    **args: Any,
) -> nn.Module:
    config = ModelConfig(name=name, args=args, weights=weights)
    return build_model(
        config, num_classes=num_classes, in_channels=shape[0], image_size=shape[1:], seed=seed, notify=notify
    )


class Exp(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.exp()


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        ([nn.Softmax(1)], "softmax"),
        ([nn.LogSoftmax(1), Exp()], "softmax"),
        ([nn.Sigmoid()], "sigmoid"),
        ([nn.Sigmoid(), nn.Unflatten(1, (2, 5)), nn.Flatten()], "sigmoid"),
        ([nn.LogSoftmax(1)], None),  # logits, but for a constant in each row
        ([nn.Hardsigmoid()], None),
        ([nn.Threshold(100, 0.1)], None),  # ten equal outputs that add up to 1
        ([nn.Linear(10, 10), nn.Identity()], None),
    ],
)
def test_probabilities_are_refused(monkeypatch, last, kind):
    monkeypatch.setattr(MODELS, "_registered", {})
    MODELS.register("mine")(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10), *last))
    if kind is None:
        assert build("mine").training
    else:
        with pytest.raises(ModelError, match=f"mine ends in a {kind}: its outputs are probabilities"):
            build("mine")


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_only_numbers_may_end_in_a_sigmoid(task):
    config = GivenModel(name="own", module=nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), nn.Sigmoid()))
    shape = {"num_classes": 4, "in_channels": 3, "image_size": (8, 8), "seed": 0, "task": task}
    if task == "regression":
        assert build_model(config, **shape)(torch.rand(2, 3, 8, 8)).shape == (2, 4)
    else:
        with pytest.raises(ModelError, match="ends in a sigmoid"):
            build_model(config, **shape)


class Applied(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.function(inputs)


class AlwaysTraining(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> AlwaysTraining:
        return super().train(True)


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (lambda: Applied(nn.functional.dropout), "other logits at each call"),
        (lambda: nn.BatchNorm2d(3, track_running_stats=False), "beside other images"),
        (lambda: AlwaysTraining(3), "beside other images"),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.InstanceNorm2d(3)), None),
        (lambda: Applied(lambda images: images * float("nan")), None),  # said where it is trained or evaluated
    ],
)
def test_logits_are_a_function_of_the_image(layer: Callable[[], nn.Module], sentence: str | None) -> None:
    network = nn.Sequential(layer(), nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    before = weights_sha256(network)

    def build() -> nn.Module:
        config = GivenModel(name="own", module=network)
        return build_model(config, num_classes=4, in_channels=3, image_size=(8, 8), seed=0)

    if sentence is None:
        assert weights_sha256(build()) == before
    else:
        with pytest.raises(ModelError, match=sentence):
            build()
