"""The small-image networks are those of the field's tables, and can be hooked, traced and pruned."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch_pruning
from torch import Tensor, fx, nn

from kdpipe.stages.models.build import ModelConfig, build_model
from kdpipe.stages.models.hooks import get_module
from kdpipe.stages.models.registry import SMALL_IMAGE_NETWORKS, build_small_image_network
from kdpipe.stages.models.weights.state_dict import count_parameters

# Counted on the reference code (RepDistiller b84f547) at 100 classes and 3 channels.
PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet50_cifar": 23_705_252,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg13": 9_462_180,
    "vgg16": 14_774_436,
    "vgg19": 20_086_692,
    "mobilenet_v2": 812_836,
    "shufflenet_v1": 949_258,
    "shufflenet_v2": 1_355_528,
}
# One of each kind of block.
KINDS = ["resnet20", "wrn_16_2", "vgg8", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2", "cnn", "cnn_average", "mlp"]
# Path, shape for two images of 3 x 32 x 32, whether it is after a ReLU.
MAPS = [
    ("resnet20", "layer1", [2, 16, 32, 32], True),
    ("resnet20", "layer2", [2, 32, 16, 16], True),
    ("resnet20", "layer3", [2, 64, 8, 8], True),
    ("resnet8x4", "layer3", [2, 256, 8, 8], True),
    ("resnet50_cifar", "layer1", [2, 256, 32, 32], True),
    ("resnet50_cifar", "layer4", [2, 2048, 4, 4], True),
    ("wrn_16_2", "layer1", [2, 32, 32, 32], False),
    ("wrn_16_2", "layer2", [2, 64, 16, 16], False),
    ("wrn_16_2", "layer3", [2, 128, 8, 8], False),
    ("wrn_16_2", "relu", [2, 128, 8, 8], True),
    ("vgg8", "block0", [2, 64, 32, 32], True),
    ("vgg8", "block3", [2, 512, 4, 4], True),
    ("vgg8", "block4", [2, 512, 4, 4], True),
    ("mobilenet_v2", "conv1", [2, 16, 16, 16], True),
    ("mobilenet_v2", "blocks.2", [2, 16, 8, 8], False),
    ("mobilenet_v2", "blocks.6", [2, 160, 2, 2], False),
    ("mobilenet_v2", "conv2", [2, 1280, 2, 2], True),
    ("shufflenet_v1", "layer1", [2, 240, 16, 16], True),
    ("shufflenet_v1", "layer3", [2, 960, 4, 4], True),
    ("shufflenet_v2", "layer2", [2, 232, 8, 8], True),
    ("shufflenet_v2", "relu2", [2, 1024, 4, 4], True),
    ("cnn", "stage1", [2, 32, 32, 32], True),
    ("cnn", "stage2", [2, 64, 16, 16], True),
    ("cnn_average", "pool2", [2, 64, 1, 1], True),
    ("mlp", "layer1", [2, 64], True),
]


def build(name: str, shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10, **args: Any) -> nn.Module:
    config = ModelConfig(name=name, args=args)
    return build_model(config, num_classes=num_classes, in_channels=shape[0], image_size=shape[1:], seed=0)


def blueprint(name: str) -> nn.Module:
    """The network without memory for its weights: nothing is drawn, nothing computed."""
    with torch.device("meta"):
        return build_small_image_network(name, {}, num_classes=100, in_channels=3, image_size=(32, 32))


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_every_network_of_the_tables_is_counted() -> None:
    assert set(PARAMETERS) == set(SMALL_IMAGE_NETWORKS) - {"cnn", "cnn_average", "mlp"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_tables(name: str) -> None:
    assert count_parameters(blueprint(name)) == PARAMETERS[name]


def test_parameters_of_the_smallest_networks() -> None:
    convs = 9 * (1 * 8 + 8 * 8 + 8 * 16 + 16 * 16)
    norms = 2 * (8 + 8 + 16 + 16)
    assert count_parameters(build("cnn", (1, 28, 28), width=8)) == convs + norms + 16 * 7 * 7 * 10 + 10
    assert count_parameters(build("cnn_average", (1, 28, 28), width=8)) == convs + norms + 16 * 10 + 10
    assert count_parameters(build("mlp", (1, 8, 8), hidden=[32, 16])) == 65 * 32 + 33 * 16 + 17 * 10
    assert count_parameters(build("mlp", (1, 8, 8), hidden=[])) == 65 * 10


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet20", (1, 28, 28)),
        ("resnet8x4", (3, 28, 28)),
        ("wrn_16_2", (1, 28, 28)),
        ("vgg8", (1, 28, 28)),
        ("vgg8", (3, 64, 64)),
        ("mobilenet_v2", (1, 28, 28)),
        ("mobilenet_v2", (3, 64, 64)),
        ("shufflenet_v1", (1, 28, 28)),
        ("shufflenet_v2", (3, 64, 64)),
        ("resnet20", (3, 24, 40)),
        ("cnn", (1, 28, 28)),
        ("cnn", (1, 8, 8)),
        ("cnn", (3, 24, 40)),
        ("mlp", (1, 8, 8)),
        ("mlp", (3, 24, 40)),
    ],
)
def test_other_images_give_logits_too(name: str, shape: tuple[int, int, int]) -> None:
    logits = build(name, shape, num_classes=7)(images(3, *shape))
    assert logits.shape == (3, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize(("name", "path", "shape", "rectified"), MAPS)
def test_maps_are_what_the_docstrings_say(name: str, path: str, shape: list[int], rectified: bool) -> None:
    model, seen = build(name), []
    get_module(model, path).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(images(2, 3, 32, 32))
    assert list(seen[0].shape) == shape
    assert bool((seen[0] >= 0).all()) == rectified


@pytest.mark.parametrize("name", KINDS)
def test_a_hooked_map_is_not_overwritten_by_what_follows(name: str) -> None:
    model, kept = build(name), []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        kept.append((output, output.clone()))

    for module in model.modules():
        module.register_forward_hook(keep)
    model(images(2, 3, 32, 32))
    assert len(kept) > 3
    assert all(torch.equal(output, copy) for output, copy in kept)


@pytest.mark.parametrize("name", KINDS)
def test_traced_networks_compute_the_same(name: str) -> None:
    model, batch = build(name).eval(), images(2, 3, 32, 32)
    assert torch.equal(fx.symbolic_trace(model)(batch), model(batch))


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_learns(name: str) -> None:
    model = build(name)
    nn.functional.cross_entropy(model(images(3, 3, 32, 32)), torch.tensor([0, 1, 2])).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()] == []
    # A bias before a batch norm has no effect: its gradient is rounding error, or zero.
    assert [name for name, grad in grads.items() if grad is not None and grad.ndim > 1 and not grad.any()] == []


@pytest.mark.parametrize("name", SMALL_IMAGE_NETWORKS)
def test_networks_can_be_traced_and_each_module_is_used_once(name: str) -> None:
    graph = fx.symbolic_trace(blueprint(name)).graph
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called))
    assert not [node for node in graph.nodes if "relu" in str(node.target) and node.op != "call_module"]


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2", "vgg8", "mobilenet_v2", "cnn"])
def test_channels_can_be_pruned(name: str) -> None:
    model, batch = build(name).eval(), images(2, 3, 32, 32)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    before, width = count_parameters(model), convs[0].out_channels
    graph = torch_pruning.DependencyGraph().build_dependency(model, [batch])
    graph.get_pruning_group(convs[0], torch_pruning.prune_conv_out_channels, idxs=[0, 1]).prune()
    assert convs[0].out_channels == width - 2
    assert count_parameters(model) < before
    assert model(batch).shape == (2, 10)


def test_first_weights_follow_he() -> None:
    conv = get_module(build("vgg8"), "block4.0")
    assert isinstance(conv, nn.Conv2d)
    assert float(conv.weight.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 512)), rel=0.01)
    assert not conv.bias.any()
    classifier = get_module(build("mobilenet_v2", num_classes=100), "classifier.0")
    assert float(classifier.state_dict()["weight"].std()) == pytest.approx(0.01, rel=0.02)


def test_vgg_pools_images_of_64_pixels_once_more() -> None:
    small, large = build("vgg8", (3, 32, 32)), build("vgg8", (3, 64, 64))
    pools = [sum(isinstance(module, nn.MaxPool2d) for module in model.modules()) for model in (small, large)]
    assert pools == [3, 4]


def test_cnn_grows_with_its_arguments() -> None:
    model = build("cnn", (1, 32, 32), width=4, num_stages=3, convs_per_stage=1)
    widths = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert widths == [4, 8, 16]
