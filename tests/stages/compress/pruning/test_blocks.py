"""Blocks are found by what they compute, and are skipped without a trace elsewhere."""

import pytest
import torch
from support.tiny_nets import EXAMPLE, NUM_CLASSES, Residual, build, images
from torch import nn

from kdpipe.stages.compress.pruning.blocks import SkippedBlock, find_blocks, skip_blocks, skipped, skipped_paths
from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.build import ModelConfig, build_model

LAYERS = {"num_attention_heads": 3, "num_hidden_layers": 2}
SHUFFLE = [f"layer{stage}.{number}" for stage, count in ((1, 4), (2, 8), (3, 4)) for number in range(1, count)]
HF = {"hidden_size": 12, "intermediate_size": 32, "patch_size": 4, **LAYERS}


class PostNorm(nn.Module):
    """Two layers of a transformer with a norm behind each sum, so that no sum has the layer's own input."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        make = nn.TransformerEncoderLayer
        self.layers = nn.ModuleList(make(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2))
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(src=x)  # by keyword
        return self.fc(x.mean(1))


class Inspecting(Residual):
    """A network that reads an attribute of its second block."""

    def forward(self, x):
        assert self.layer1[1].conv1.weight.shape[0] == 16
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (lambda: build("residual"), [("layer1.0",), ("layer1.1",)]),
        (lambda: build("depthwise"), [("depthwise.0", "depthwise.1", "depthwise.2")]),  # the sum is in no module
        (lambda: build("plain"), []),
        (PostNorm, [("layers.0",), ("layers.1",)]),
    ],
    ids=["residual", "depthwise", "plain", "post-norm"],
)
def test_blocks_keep_the_shape_of_their_input(model, wanted):
    assert find_blocks(model(), EXAMPLE)[0] == wanted


@pytest.mark.parametrize(
    ("name", "args", "wanted"),
    [
        ("resnet20", {}, [f"layer{stage}.{number}" for stage in (1, 2, 3) for number in range(stage > 1, 3)]),
        ("wrn_16_2", {}, ["layer1.1", "layer2.1", "layer3.1"]),
        ("vgg13", {}, ["block0.3", "block1.3", "block2.3", "block3.3", "block4.0", "block4.3"]),
        (
            "shufflenet_v2",
            {},
            SHUFFLE,
        ),
        ("torchvision:resnet18", {}, ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
        ("timm:vit_tiny_patch16_224", {"depth": 2, "embed_dim": 12, "num_heads": 3}, ["blocks.0", "blocks.1"]),
        ("hf:none", {"model_type": "deit", **HF}, ["deit.layers.0", "deit.layers.1"]),
    ],
)
def test_blocks_of_networks(name, args, wanted):
    if name.partition(":")[0] in ("timm", "hf"):
        pytest.importorskip("timm" if name.startswith("timm") else "transformers")
    config = ModelConfig(name=name, args=args)
    model = build_model(config, num_classes=NUM_CLASSES, in_channels=3, image_size=(16, 16), seed=0)
    found, _ = find_blocks(model, torch.zeros(2, 3, 16, 16))
    assert [block[0] for block in found] == wanted


def test_finding_blocks_leaves_no_trace():
    model = build("residual")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_blocks(model, EXAMPLE)
    assert model.training and not skipped_paths(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_skipped_block_passes_its_input_on():
    model, batch = build("residual").eval(), images(4)[0]
    whole = model(batch)
    stem = model.stem(batch)
    with skipped(model, ["layer1.0"]):
        found = model(batch)
    second = model.layer1[1](stem.clone())
    torch.testing.assert_close(found, model.fc(model.layer2(second).mean(dim=(2, 3))))
    torch.testing.assert_close(model(batch), whole)


@pytest.mark.parametrize(
    ("model", "settings", "path", "reason"),
    [
        (Residual, {"exclude": ["layer1.0.conv1"]}, "layer1.0", "named in prune.exclude"),
        (Residual, {"exclude": ["layer1"]}, "layer1.1", "named in prune.exclude"),
        (Residual, {"read": ["layer1.1.bn2"]}, "layer1.1", "a loss reads its layer 'layer1.1.bn2'"),
        (Inspecting, {}, "layer1.1", "the model does not run without it"),
    ],
)
def test_blocks_that_stay_have_a_reason(model, settings, path, reason):
    found, stays = find_blocks(model(), EXAMPLE, **settings)
    assert (path,) not in found and stays[path].startswith(reason)


def test_a_block_that_a_loss_reads_may_go():
    assert ("layer1.1",) in find_blocks(Residual(), EXAMPLE, read=["layer1.1", "layer1"])[0]


@pytest.mark.parametrize("paths", ["layer1.0", [3], [""], ["layer9"], ["layer1", "layer1.0"], {"layer1.0": 1}, None])
def test_record_of_other_blocks_is_an_error(paths):
    model = build("residual")
    with pytest.raises(ModelError, match="record of removed blocks"):
        skip_blocks(model, paths)
    assert not any(isinstance(module, SkippedBlock) for module in model.modules())
