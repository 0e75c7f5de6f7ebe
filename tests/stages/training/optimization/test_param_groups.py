"""Tests of parameter groups: which parameters have weight decay, and the rates of layers."""

import pytest
import torch
import torchvision
from torch import nn

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.models.networks.resnet import NARROW, resnet
from kdpipe.stages.training.optim import TrainConfig, build_optimizer, set_learning_rate
from kdpipe.stages.training.optimization.param_groups import layer_scales, parameter_groups


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 2, 3))
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.layer_norm, self.head = nn.LayerNorm([2, 6, 6]), nn.Linear(2, 4)


def names_of(modules, parameters):
    by_id = {id(one): name for name, one in modules.named_parameters()}
    return {by_id[id(one)] for one in parameters}


def test_exempt_parameters_are_norms_and_biases():
    modules = nn.ModuleDict({"student": Net(), "distillation": nn.Conv2d(2, 2, 1)})
    groups = parameter_groups(modules, decay_norm_and_bias=False, layer_decay=None)
    decayed, exempt = sorted(groups, key=lambda group: "weight_decay" in group)
    assert names_of(modules, decayed["params"]) == {
        "student.token",
        "student.conv.weight",
        "student.head.weight",
        "distillation.weight",
    }
    assert exempt["weight_decay"] == 0
    assert names_of(modules, exempt["params"]) == {
        *("student.conv.bias", "student.norm.weight", "student.norm.bias", "student.head.bias", "distillation.bias"),
        *("student.layer_norm.weight", "student.layer_norm.bias"),
    }


def test_without_gradients_only_decayed_weights_shrink():
    modules = nn.ModuleDict({"student": Net()})
    with torch.no_grad():
        for one in modules.parameters():
            one.fill_(1.0)
    optimizer = build_optimizer(TrainConfig(decay_norm_and_bias=False, weight_decay=0.5, lr=1.0), modules)
    for one in modules.parameters():
        one.grad = torch.zeros_like(one)
    optimizer.step()
    shrunk = {name for name, one in modules.named_parameters() if (one == 0.5).all()}
    assert shrunk == {"student.token", "student.conv.weight", "student.head.weight"}
    assert all((one == 1).all() for name, one in modules.named_parameters() if name not in shrunk)


def test_rates_fall_from_layer_to_layer():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()),
        nn.ModuleList([nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)]),
        nn.Linear(2, 4),
    )
    modules = nn.ModuleDict({"student": model, "distillation": nn.Linear(2, 2)})
    optimizer = build_optimizer(TrainConfig(layer_decay=0.5, lr=0.8), modules)
    set_learning_rate(optimizer, 0.8)
    by_id = {id(one): name for name, one in modules.named_parameters()}
    rates = {by_id[id(one)]: group["lr"] for group in optimizer.param_groups for one in group["params"]}
    assert {name.rpartition(".")[0]: rate for name, rate in rates.items()} == {
        "student.0.0": pytest.approx(0.1),
        "student.0.1": pytest.approx(0.1),  # a norm belongs to the layer before it
        "student.1.0": pytest.approx(0.2),
        "student.1.1": pytest.approx(0.4),
        "student.2": pytest.approx(0.8),
        "distillation": pytest.approx(0.8),
    }
    assert len(rates) == len(list(modules.parameters()))


def depths(model):
    """The number of layers after each parameter."""
    scales = layer_scales(model, 0.5)
    return {name: round(-torch.tensor(scales[id(one)]).log2().item()) for name, one in model.named_parameters()}


def test_layers_are_blocks_of_networks():
    found = depths(resnet(20, NARROW, num_classes=10, in_channels=3))
    assert len(set(found.values())) == 11  # the first convolution, nine blocks, the classifier
    found = depths(torchvision.models.resnet18())
    assert len(set(found.values())) == 10
    assert (found["fc.weight"], found["layer4.1.conv2.weight"], found["layer4.0.downsample.0.weight"]) == (0, 1, 2)
    assert found["conv1.weight"] == found["bn1.weight"] == 9
    found = depths(torchvision.models.VisionTransformer(32, 16, 4, 2, 32, 64))
    assert found["class_token"] == found["conv_proj.weight"] == max(found.values()) == 5
    assert found["encoder.layers.encoder_layer_0.mlp.0.weight"] == 4


def test_model_of_timm_has_its_own_layers():
    timm = pytest.importorskip("timm")
    found = depths(timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=4))
    assert (found["head.weight"], found["blocks.2.attn.qkv.weight"], found["patch_embed.proj.weight"]) == (0, 1, 4)


def test_layer_decay_of_one_layer_is_refused():
    with pytest.raises(RecipeError, match="one layer"):
        layer_scales(nn.Sequential(nn.Linear(2, 2)), 0.5)
    wrapped = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))
    assert set(depths(wrapped).values()) == {0, 1}
