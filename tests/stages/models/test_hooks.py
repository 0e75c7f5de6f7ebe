"""Modules are found by the path that a recipe names, and features are what these modules returned."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError
from kdpipe.stages.models import hooks
from kdpipe.stages.models.build import ModelConfig, build_model
from kdpipe.stages.models.hooks import extract_features, get_module, overwritten_layers


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


class InPlace(nn.Module):
    """Overwrites what `norm`, `view` and (in training) `fc` return, calls `relu` twice, and draws random numbers."""

    def __init__(self, *, spoils_input: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.view, self.fc, self.drop = nn.Flatten(), nn.Linear(64, 64), nn.Dropout(0.5, inplace=True)
        self.head, self.spoils_input = nn.Linear(64, 3), spoils_input

    def forward(self, images: Tensor) -> Tensor:
        if self.spoils_input:
            images.sub_(0.5)
        flat = self.view(self.relu(self.norm(self.conv(images))))
        flat += 1
        return self.head(self.relu(self.drop(self.fc(flat))))  # type: ignore[no-any-return]


def outputs_of(model: nn.Module, images: Tensor, layers: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """What the modules return in their last call, copied at once."""
    copies: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: copies.update({name: out.clone()}))
        for name in layers
    ]
    logits = model(images)
    for handle in handles:
        handle.remove()
    return logits, copies


def twins(**changes: bool) -> tuple[InPlace, InPlace]:
    first, second = InPlace(**changes), InPlace(**changes)
    second.load_state_dict(first.state_dict())
    return first, second


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_features_are_what_the_modules_returned(mode: type, training: bool) -> None:
    layers = ("conv", "norm", "relu", "view", "fc")
    model, plain = (each.train(training) for each in twins())
    images = torch.rand(4, 1, 6, 6)
    with mode(), extract_features(model, layers) as extractor:
        for _ in range(2):  # the first call finds what is overwritten
            torch.manual_seed(1)
            expected, copies = outputs_of(plain, images, layers)
            torch.manual_seed(1)
            found = extractor(images)
            assert torch.equal(found.logits, expected)
            assert {name for name in layers if not torch.equal(found.features[name], copies[name])} == set()
    for name, value in model.state_dict().items():  # batch norm has counted the first call once
        assert torch.equal(value, plain.state_dict()[name]), name


def test_layers_that_are_overwritten_are_known() -> None:
    found = overwritten_layers(InPlace(), ("conv", "norm", "relu", "view", "fc", "head"), (1, 6, 6))
    assert found == {"norm", "view", "fc"}  # nothing overwrites the last call of relu


def test_gradients_flow_through_copied_features() -> None:
    model, plain = twins()
    images = torch.rand(4, 1, 6, 6)
    outputs_of(plain, images, ("norm",))[1]["norm"].square().sum().backward()
    with extract_features(model, ["norm"]) as extractor:
        extractor(images).features["norm"].square().sum().backward()
    assert model.conv.weight.grad is not None and plain.conv.weight.grad is not None
    assert torch.equal(model.conv.weight.grad, plain.conv.weight.grad)


def test_an_input_that_the_network_overwrites_stays() -> None:
    model, plain = twins(spoils_input=True)
    images = torch.rand(4, 1, 6, 6)
    before = images.clone()
    torch.manual_seed(1)
    expected = plain(images.clone())
    with extract_features(model, ["conv"]) as extractor:
        torch.manual_seed(1)
        assert torch.equal(extractor(images).logits, expected)
        extractor(images)
    assert torch.equal(images, before)


def test_hints_alone_come_from_the_last_call_of_a_layer() -> None:
    model, plain = twins()
    images = torch.rand(4, 1, 6, 6)
    torch.manual_seed(1)
    _, copies = outputs_of(plain, images, ("relu",))
    with extract_features(model, ["relu"], no_further=True) as extractor:
        torch.manual_seed(1)
        found = extractor(images)
    assert torch.equal(found.features["relu"], copies["relu"])
    assert found.logits.shape == (4, 0)


def test_an_operation_in_some_passes_only_is_refused() -> None:
    class Sometimes(InPlace):
        def forward(self, images: Tensor) -> Tensor:
            out = self.conv(images)
            return self.head(self.view(out.relu_() if images.sum() > 0 else out.relu()))  # type: ignore[no-any-return]

    with extract_features(Sometimes(), ["conv"]) as extractor:
        extractor(-torch.ones(2, 1, 6, 6))
        with pytest.raises(ModelError, match="overwrites the output of 'conv' in place in some"):
            extractor(torch.ones(2, 1, 6, 6))


class Trainable(InPlace):
    """As InPlace, without overwriting what the backward pass needs."""

    def forward(self, images: Tensor) -> Tensor:
        flat = self.view(self.relu(self.norm(self.conv(images)))) + 1
        return self.head(self.relu(self.drop(self.fc(flat))))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_compiled_pass_has_the_features_of_a_plain_one(mode: type) -> None:
    layers = ("conv", "norm", "relu", "view", "fc")
    model, plain = (each.eval() for each in twins(spoils_input=True))
    images = torch.rand(4, 1, 6, 6)
    before = images.clone()
    with mode(), extract_features(model, layers, compile_key="cache.compile") as extractor:
        expected, copies = outputs_of(plain, images.clone(), layers)
        for _ in range(2):
            found = extractor(images)
            assert torch.equal(found.logits, expected)
            assert {name for name in layers if not torch.equal(found.features[name], copies[name])} == set()
    assert torch.equal(images, before)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_compiled_pass_is_freed_with_its_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CUDA graph has memory of its own, which the next network could not use."""
    kept: list[weakref.ref[object]] = []

    def compiled(function: Callable[[Tensor], object], device: torch.device, *, key: str) -> Callable[[Tensor], object]:
        run = partial(function)
        kept.append(weakref.ref(run))
        return run

    monkeypatch.setattr(hooks, "compiled", compiled)
    with extract_features(InPlace().eval(), ["fc"], compile_key="cache.compile") as extractor:
        extractor(torch.rand(2, 1, 6, 6))
        assert kept[0]() is not None
    assert kept[0]() is None


@pytest.mark.usefixtures("traced")
def test_a_compiled_pass_trains_as_a_plain_one() -> None:
    model, plain = Trainable(), Trainable()
    plain.load_state_dict(model.state_dict())
    with extract_features(model, ["norm"], compile_key="train.compile") as extractor:
        for size in (4, 3):
            images = torch.rand(size, 1, 6, 6)
            torch.manual_seed(1)
            expected, copies = outputs_of(plain, images, ("norm",))
            torch.manual_seed(1)
            found = extractor(images)
            (expected.square().sum() + copies["norm"].square().sum()).backward()
            (found.logits.square().sum() + found.features["norm"].square().sum()).backward()
            torch.manual_seed(1)
            assert torch.equal(extractor.eager(images).logits, expected)
            outputs_of(plain, images, ())
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad), name
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
