"""A network is built from its name alone, equal seeds give equal weights, and every mistake has its sentence."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdpipe.stages.errors import ModelError
from kdpipe.stages.export.exportable import export_form
from kdpipe.stages.models.build import GivenModel, ModelConfig, architecture, build_model, list_models
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.weights.state_dict import weights_sha256

FACTORIES = """
import types
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, width=4):
        super().__init__(nn.Flatten(), nn.LazyLinear(width), nn.Linear(width, num_classes))

def sized(image_size, in_channels, num_classes, *, bias):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size[0] * image_size[1], num_classes, bias=bias))

def anything(**kwargs):
    assert sorted(kwargs) == ["num_classes", "twist"]
    return Net(kwargs["num_classes"])

def no_module(num_classes):
    return [num_classes]

def broken(num_classes):
    raise KeyError("oh\\nno")

class Pair(Net):
    def forward(self, x):
        return x, super().forward(x)

class Nothing(Net):
    def forward(self, x):
        super().forward(x)

def nothing(num_classes):
    return Nothing(num_classes)

class Heads(nn.Module):
    def __init__(self, num_classes, kind="tuple"):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5))
        self.head, self.other = nn.Linear(3600, num_classes), nn.Linear(3600, num_classes)
        self.kind = kind

    def forward(self, x):
        x = self.body(x)
        if self.kind == "object":
            return types.SimpleNamespace(logits=self.head(x), hidden=x)
        if self.kind == "mapping":
            return {"hidden": x, "logits": self.head(x)}
        return (self.head(x), self.other(x)) if self.training else self.evaluate(x)

    def evaluate(self, x):
        return self.head(x)

class Distilled(Heads):
    def evaluate(self, x):
        return (self.head(x) + self.other(x)) / 2

def traced(num_classes):
    return torch.jit.trace(nn.Linear(2, num_classes), torch.zeros(2, 2))

def half_scripted(num_classes):
    return nn.Sequential(torch.jit.script(nn.Flatten()), nn.LazyLinear(num_classes))

def parallel(num_classes):
    return nn.DataParallel(Heads(num_classes))

def too_wide(num_classes):
    return Net(num_classes + 1)

constant = 3
"""


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


def says(text: str) -> Any:
    return pytest.raises(ModelError, match=re.escape(text))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module of factories."""
    (tmp_path / "own_networks.py").write_text(FACTORIES)
    (tmp_path / "own_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    return "python:own_networks"


def test_equal_seeds_give_equal_weights() -> None:
    digests = [weights_sha256(build("resnet20", seed=seed)) for seed in (3, 3, 4)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", ["cnn", "torchvision:squeezenet1_1"])
def test_the_global_generator_neither_decides_nor_moves(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights_sha256(build(name))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert weights_sha256(build(name)) == first


def test_network_is_in_training_mode_with_initial_statistics() -> None:
    model = build("resnet20")
    assert all(module.training for module in model.modules())
    assert not model.state_dict()["bn1.running_mean"].any()
    assert int(model.state_dict()["bn1.num_batches_tracked"]) == 0


def test_weights_are_loaded_from_a_path(tmp_path: Path) -> None:
    source = build("cnn", seed=1)
    save_file(source.state_dict(), tmp_path / "cnn.safetensors")
    model = build("cnn", seed=2, weights=str(tmp_path / "cnn.safetensors"))
    assert weights_sha256(model) == weights_sha256(source)


@pytest.mark.parametrize("weights", ["no/such/file.pt", "~/no/such/file.pt", "~no_such_user/file.pt"])
def test_missing_weights(weights: str) -> None:
    with pytest.raises(ModelError, match=r"there is no weights file .*no/such/file\.pt|no home folder"):
        build("cnn", weights=weights)


def test_small_image_networks_have_no_published_weights() -> None:
    with says("there are no published weights of resnet20"):
        build("resnet20", weights="published")


def test_names_are_listed_once_each_and_known() -> None:
    names = list_models()
    assert len(names) == len(set(names))
    assert {"resnet20", "cnn", "resnet18", "mobilenet_v2", "torchvision:mobilenet_v2"} <= set(names)
    assert "torchvision:resnet18" not in names
    assert {"googlenet", "inception_v3"} <= set(names)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnt20", "did you mean 'resnet20'"),
        ("WRN-40-2", "did you mean 'wrn_40_2'"),
        ("torchvision:mobilenet_v4", "did you mean 'torchvision:mobilenet_v2'"),
        ("torchvision:resnet20", "did you mean 'torchvision:resnet"),
        ("zzz", "python:package.module:factory"),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(name: str, nearest: str) -> None:
    with says(f"no model is called {name!r}; ") as caught:
        build(name)
    assert nearest in str(caught.value)


@pytest.mark.parametrize(
    ("name", "args", "sentence"),
    [
        ("resnet20", {"width": 3}, "resnet20 has no argument 'width': it takes none."),
        ("cnn", {"widht": 3}, "cnn has no argument 'widht': it takes convs_per_stage, num_stages, width."),
        ("cnn", {"width": 0}, "cnn: args.width must be an integer of 1 or more, found 0."),
        ("cnn", {"width": 8.0}, "cnn: args.width must be an integer of 1 or more, found 8.0."),
        ("cnn", {"num_stages": True}, "cnn: args.num_stages must be an integer of 1 or more, found True."),
        ("cnn", {"image_size": 4}, "cnn: args.image_size is set by kdpipe itself"),
        ("mlp", {"hidden": 64}, "mlp: args.hidden must be a list of widths such as [64], found 64."),
        ("mlp", {"hidden": [8, -1]}, "mlp: args.hidden[1] must be an integer of 1 or more, found -1."),
    ],
)
def test_wrong_arguments(name: str, args: dict[str, Any], sentence: str) -> None:
    with says(sentence):
        build(name, **args)


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("resnet20", (3, 3, 3), "resnet20 needs images of 4 x 4 or more, the data has 3 x 3."),
        ("vgg8", (3, 28, 7), "vgg8 needs images of 8 x 8 or more, the data has 28 x 7."),
        ("mobilenet_v2", (1, 8, 8), "mobilenet_v2 needs images of 16 x 16 or more, the data has 8 x 8."),
        ("cnn", (1, 3, 8), "cnn with num_stages = 2 needs images of 4 x 4 or more, the data has 3 x 8."),
    ],
)
def test_images_too_small(name: str, shape: tuple[int, int, int], sentence: str) -> None:
    with says(sentence):
        build(name, shape)


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_1", "vgg8", "shufflenet_v2", "mobilenet_v2", "cnn"])
def test_the_least_images_train(name: str) -> None:
    side = {"mobilenet_v2": 16, "vgg8": 8, "shufflenet_v2": 8}.get(name, 4)
    assert build(name, (3, side, side))(torch.randn(2, 3, side, side)).shape == (2, 10)


def test_a_factory_gets_the_keywords_it_takes(own: str) -> None:
    assert build(f"{own}:Net", width=5)[1].out_features == 5
    assert build(f"{own}:sized", (1, 8, 6), bias=False)[1].in_features == 48


def test_kwargs_of_a_factory_take_only_args(own: str) -> None:
    config = ModelConfig(name=f"{own}:anything", args={"twist": 1, "num_classes": 10})
    assert isinstance(build_model(config, num_classes=10, in_channels=3, image_size=(8, 8), seed=0), nn.Module)
    with says(f"{own}:Net: args.num_classes is set by kdpipe itself"):
        architecture_args = {"num_classes": 10}
        build_model(
            ModelConfig(name=f"{own}:Net", args=architecture_args),
            num_classes=10,
            in_channels=3,
            image_size=(8, 8),
            seed=0,
        )


@pytest.mark.parametrize(
    ("factory", "args", "sentence"),
    [
        (":Net", {"widht": 5}, ":Net has no argument 'widht': it takes width."),
        (":sized", {}, ":sized needs args.bias"),
        (":no_module", {}, ":no_module returned list, wanted a torch.nn.Module."),
        (":broken", {}, ":broken failed (KeyError: 'oh\\nno')."),
        (":Pair", {}, ":Pair makes [2, 3, 32, 32] of two images of 3 x 32 x 32, wanted logits [2, 10]."),
        (":nothing", {}, ":nothing returns NoneType, wanted a tensor of logits [B, 10]."),
        (":traced", {}, ":traced is a TorchScript module, which can neither be copied nor exported: use the nn.Module"),
        (":half_scripted", {}, ":half_scripted has a TorchScript module, 0, which can neither"),
        (":Distilled", {}, ":Distilled returns tuple in training, and other.weight decides its logits in evaluation"),
        (":too_wide", {}, ":too_wide makes [2, 11] of two images of 3 x 32 x 32, wanted logits [2, 10]."),
        (":Nett", {}, "own_networks has no function Nett"),
        (":constant", {}, "own_networks has no function constant"),
        ("", {}, "must read python:package.module:function."),
        (".deeper:Net", {}, "the module own_networks.deeper cannot be imported (ModuleNotFoundError"),
    ],
)
def test_faulty_factories(own: str, factory: str, args: dict[str, Any], sentence: str) -> None:
    with says(sentence):
        build(own + factory, **args)


@pytest.mark.parametrize(
    ("kind", "notice"),
    [
        ("tuple", ":Heads returns tuple in training: its main logits are used"),
        ("object", ":Heads returns SimpleNamespace: its main logits are used"),
        ("mapping", ":Heads returns dict: its main logits are used"),
    ],
)
def test_of_several_outputs_the_main_logits_are_used(own: str, kind: str, notice: str) -> None:
    notices: list[str] = []
    model = build(f"{own}:Heads", kind=kind, notify=notices.append)
    assert [notice in sentence for sentence in notices] == [True]
    images = torch.randn(2, 3, 32, 32)
    copy = clone_without_hooks(model)
    assert int(model.state_dict()["body.1.num_batches_tracked"]) == 0  # nothing remembers the trial
    for network in (model, copy):
        torch.manual_seed(0)
        logits = network(images)
        torch.manual_seed(0)
        assert torch.equal(logits, network.head(network.body(images)))  # type: ignore[operator]
    assert type(model).__name__ == "Heads"
    assert isinstance(export_form(model)(images), torch.Tensor)
    assert torch.fx.symbolic_trace(model.eval())(images).shape == (2, 10)  # as quantization does


def test_several_outputs_draw_no_random_number(own: str) -> None:
    given = build(f"{own}:Heads")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    config = GivenModel(name="object:Heads", module=given)
    build_model(config, num_classes=10, in_channels=3, image_size=(32, 32), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_factory_may_wrap_its_network(own: str) -> None:
    notices: list[str] = []
    model = build(f"{own}:parallel", notify=notices.append)
    assert type(model).__name__ == "Heads"
    assert notices[0] == f"{own}:parallel returns DataParallel: the Heads inside is used."


def test_modules_without_the_factory(own: str) -> None:
    with says("the module own_broken cannot be imported (ZeroDivisionError: division by zero)"):
        build("python:own_broken:Net")
    with says("model.name='python:sys:Net': sys has no function Net"):
        build("python:sys:Net")


def test_architecture_is_json_with_the_defaults_written_out() -> None:
    record = architecture(ModelConfig(name="cnn", args={"width": 8}), 10, 1, (28, 32))
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "model": "cnn",
        "args": {"width": 8, "num_stages": 2, "convs_per_stage": 2},
        "num_classes": 10,
        "in_channels": 1,
        "image_size": [28, 32],
    }
    assert architecture(ModelConfig(name="mlp"), 10, 1, (8, 8))["args"] == {"hidden": [64]}
    assert architecture(ModelConfig(name="resnet18"), 10, 3, (32, 32))["args"] == {}


def test_an_architecture_rebuilds_its_network() -> None:
    config = ModelConfig(name="cnn", args={"width": 8})
    record = architecture(config, 10, 3, (32, 32))
    again = build(record["model"], num_classes=record["num_classes"], **record["args"])
    assert weights_sha256(again) == weights_sha256(build("cnn", width=8))


@pytest.mark.parametrize("value", [object(), float("nan")])
def test_arguments_that_are_no_json(value: object) -> None:
    with says("the args of cnn must be numbers, strings, lists and tables"):
        architecture(ModelConfig(name="cnn", args={"width": value}), 10, 1, (8, 8))
