"""What is tried on an untrained network before its training: batches of every kind, training, export."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.device import DEVICE
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.training import preflight
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.preflight import try_network

TRAIN = TrainConfig(epochs=1, batch_size=8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pooled(self.body(x)))
        return logits

    def pooled(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Squeezes(Net):
    def pooled(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True).squeeze()


class NoOddBatch(Net):
    def pooled(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).view(-1, 2, 4).flatten(0, 1)


class InPlace(Net):
    def pooled(self, x: Tensor) -> Tensor:
        weight = self.fc.weight
        weight += 0 if self.training else 0.0  # on a leaf, which autograd refuses
        return x.mean((2, 3))


class Branches(Net):
    def pooled(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.mean() > 0 else x.amax((2, 3))


class MaxPools(Net):
    def pooled(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_max_pool2d(x, 3).mean((2, 3))


def attempt(model: nn.Module, config: TrainConfig | None = TRAIN, **options: Any) -> None:
    architecture = {"model": type(model).__name__, "num_classes": 3, "in_channels": 1, "image_size": [6, 6]}
    bundle = ModelBundle(model, architecture, Normalization((0.5,), (0.5,)))
    try_network(bundle, config, role="student", device=DEVICE, **options)


@pytest.fixture(autouse=True)
def nothing_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_passed", set())


def test_network_and_random_numbers_stay_unchanged() -> None:
    model, state = Net(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attempt(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("network", "config", "words"),
    [
        (Squeezes, TRAIN, ["makes [3] of a batch of one image, wanted logits [1, 3]", "flatten(1)"]),
        (Squeezes, None, ["makes [3] of a batch of one image"]),
        (NoOddBatch, TRAIN, ["does not run on a batch of 3", "of test_preflight.py, in the forward of NoOddBatch"]),
        (InPlace, TRAIN, ["cannot be trained on a batch of 2", "leaf Variable", "Change its forward"]),
        (Net, TrainConfig(epochs=1, batch_size=1), []),
        (Net, TrainConfig(epochs=1, class_weights=(0.0, 0.0, 1.0), sampler="balanced"), []),
    ],
)
def test_batches_of_other_sizes_are_tried(network: type[Net], config: TrainConfig | None, words: list[str]) -> None:
    if not words:
        attempt(network(), config)
        return
    with pytest.raises(ModelError) as refused:
        attempt(network(), config)
    assert [word for word in words if word not in str(refused.value)] == []


@pytest.mark.parametrize(("network", "word"), [(MaxPools, "adaptive_max_pool2d"), (Branches, "data-dependent")])
def test_export_is_tried_with_the_next_step(network: type[Net], word: str) -> None:
    attempt(network())
    with pytest.raises(ModelError, match=rf"exported to ONNX.*{word}.*student\.export = false"):
        attempt(network(), exports=True)


def test_what_is_not_one_graph_is_not_compiled() -> None:
    compiles = TrainConfig(epochs=1, batch_size=8, compile=True)
    attempt(Net(), compiles)
    with pytest.raises(RecipeError, match=r"train\.compile = true: torch\.compile cannot compile this .*branching"):
        attempt(Branches(), compiles)


def test_networks_are_tried_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[Any] = []
    monkeypatch.setattr(preflight, "try_export", lambda *given: exported.append(given))
    for config in (TRAIN, TRAIN, TrainConfig(epochs=3, batch_size=8)):
        attempt(Net(), config, exports=True)
    assert len(exported) == 2


@pytest.mark.parametrize(
    ("name", "config", "steps"),
    [
        ("resnet8", TRAIN, False),
        ("mine", TRAIN, True),
        ("resnet8", replace(TRAIN, layer_decay=0.5), True),
        ("resnet8", replace(TRAIN, nesterov=True), True),
    ],
)
def test_optimizers_that_cannot_fail_are_not_made(
    name: str, config: TrainConfig, steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(preflight, "time_steps", lambda job, *_: sizes.append(job.config.batch_size))
    network = ModelBundle(
        Net(), {"model": name, "num_classes": 3, "in_channels": 1, "image_size": [8, 8]}, Normalization((0.5,), (0.5,))
    )
    try_network(network, config, role="student", device=DEVICE)
    assert sizes == ([2, 3] if steps else [])
