"""Tests of structured pruning: which channels go, and that the network still runs, trains, keeps its paths."""

from __future__ import annotations

import ast
import re

import pytest
import torch
from support.tiny_nets import EXAMPLE, IMAGE_SHAPE, NETS, NUM_CLASSES, Residual, build, images, sgd, step
from torch import nn

from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.prune import prune
from kdpipe.stages.compress.pruning.widths import apply_widths, record_widths
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.models.build import ModelConfig, build_model


def pruned_of(model: nn.Module, config: PruneConfig, **options) -> nn.Module:
    return prune(model, EXAMPLE, config, **options).model


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruned_network_is_smaller_and_trains(name, scope):
    model = build(name)
    pruned = pruned_of(model, PruneConfig(ratio=0.5, scope=scope, round_to=1))
    assert num_parameters(pruned) < 0.55 * num_parameters(model)
    assert [path for path, _ in pruned.named_modules()] == [path for path, _ in model.named_modules()]
    assert pruned.eval()(images(3)[0]).shape == (3, NUM_CLASSES)
    step(pruned, sgd(pruned), seed=1)
    assert all(parameter.grad is not None for parameter in pruned.parameters())


@pytest.mark.parametrize("name", NETS)
def test_original_stays_unchanged(name):
    model = build(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    captured = []
    model.get_submodule("fc" if name != "depthwise" else "classifier").register_forward_hook(
        lambda *_: captured.append(1)
    )
    prune(model, EXAMPLE, PruneConfig())
    assert not captured
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_modes_and_frozen_parameters_are_kept():
    model = build("residual").train()
    model.stem.eval()
    model.stem[0].weight.requires_grad_(False)
    pruned = pruned_of(model, PruneConfig())
    assert pruned.training and not pruned.stem.training
    frozen = [path for path, parameter in pruned.named_parameters() if not parameter.requires_grad]
    assert frozen == ["stem.0.weight"]


def test_residual_sum_layers_lose_the_same_channels():
    pruned = pruned_of(build("residual"), PruneConfig(ratio=0.37, round_to=1))
    widths = record_widths(pruned)
    stream = {widths[path]["out_channels"] for path in ("stem.0", "layer1.0.conv2", "layer1.1.conv2")}
    assert stream == {10}  # 16 * 0.63, to the nearest
    assert widths["layer2.0.conv1"]["in_channels"] == 10
    assert widths["layer2.0.conv2"]["out_channels"] == widths["layer2.0.shortcut.0"]["out_channels"] == 15
    assert widths["fc"] == {"in_features": 15, "out_features": NUM_CLASSES}


def test_depthwise_conv_follows_its_input():
    widths = record_widths(pruned_of(build("depthwise"), PruneConfig(ratio=0.4, round_to=1)))
    assert widths["depthwise.0"] == {"in_channels": 19, "out_channels": 19, "groups": 19}


def test_least_important_channels_are_removed():
    model = build("plain")
    strong = [1, 4, 5, 9]
    with torch.no_grad():
        model.stage1[0].weight.mul_(0.01)
        model.stage2[0].weight[:, :].mul_(0.01)
        model.stage1[0].weight[strong] += 1
    pruned = pruned_of(model, PruneConfig(ratio=0.75, round_to=1))
    assert torch.equal(pruned.stage1[0].weight, model.stage1[0].weight[strong])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_linear_after_flatten_loses_all_pixels_of_a_channel(batch_size):
    model = build("plain")
    pruned = prune(model, torch.zeros(batch_size, *IMAGE_SHAPE), PruneConfig(ratio=0.5, round_to=1)).model
    assert record_widths(pruned)["hidden.0"] == {"in_features": 12 * 4, "out_features": 16}


def test_excluded_modules_keep_their_outputs():
    model = build("residual")
    widths = record_widths(pruned_of(model, PruneConfig(exclude=("layer2", "layer1.0.conv1"))))
    full = record_widths(model)
    for path in ("layer2.0.conv1", "layer2.0.conv2", "layer2.0.shortcut.0", "layer1.0.conv1"):
        assert widths[path]["out_channels"] == full[path]["out_channels"]
    assert widths["layer2.0.conv1"]["in_channels"] == widths["stem.0"]["out_channels"] == 8


def test_widths_are_rounded_to_the_nearest_multiple():
    widths = record_widths(pruned_of(build("residual"), PruneConfig(ratio=0.4, round_to=4)))
    assert {widths[path]["out_channels"] for path in ("stem.0", "layer2.0.conv1")} == {8, 16}  # of 9.6 and 14.4


def test_global_scope_respects_max_ratio():
    model = build("plain")
    with torch.no_grad():  # all of stage2 is unimportant but for a few channels
        model.stage2[0].weight[3:] *= 1e-3
        model.hidden[0].weight[:, 12:] *= 1e-3
    config = PruneConfig(ratio=0.3, scope="global", max_ratio=0.75, round_to=1)
    widths = record_widths(pruned_of(model, config))
    left = [widths["stage1.0"]["out_channels"], widths["stage2.0"]["out_channels"], widths["hidden.0"]["out_features"]]
    assert sum(left) == 16 + 24 + 32 - round(0.3 * 72)
    assert left[1] == 24 // 4


def test_equal_inputs_give_equal_weights():
    first, second = (pruned_of(build("residual"), PruneConfig(scope="global")) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))


def test_ratio_that_empties_a_layer_names_it():
    with pytest.raises(ModelError, match=r"'layer2\.\S+' \(24 channels\) without a channel: lower prune\.ratio"):
        prune(build("residual"), EXAMPLE, PruneConfig(ratio=0.98))


def test_global_ratio_beyond_max_ratio_is_an_error():
    with pytest.raises(ModelError, match=r"pruning 95% .* prune\.max_ratio"):
        prune(build("residual"), EXAMPLE, PruneConfig(ratio=0.95, scope="global"))


def test_unknown_excluded_path_suggests_the_nearest():
    with pytest.raises(ModelError, match=r"'layer3'.*layer2"):
        prune(build("residual"), EXAMPLE, PruneConfig(exclude=("layer3",)))


def test_rounding_that_undoes_pruning_is_an_error():
    with pytest.raises(ModelError, match=r"removes no channel .* up to 24: set compress\.prune\.round_to = 1\."):
        prune(build("residual"), EXAMPLE, PruneConfig(ratio=0.2, round_to=64))
    prune(build("residual"), EXAMPLE, PruneConfig(ratio=0.2, round_to=1))
    with pytest.raises(ModelError, match=r"removes no channel .*: raise compress\.prune\.ratio"):
        prune(build("residual"), EXAMPLE, PruneConfig(ratio=0.01, round_to=1))


class HardCoded(Residual):
    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x))).view(-1, 24, 16).mean(dim=2)
        return self.fc(x)


class Shuffled(nn.Module):
    def forward(self, x):
        return x.view(x.size(0), 2, -1, 8, 8).transpose(1, 2).reshape(x.size(0), -1, 8, 8)


def test_hard_coded_channels_are_an_error():
    with pytest.raises(ModelError, match=r"does not run .* relies on .* compress\.prune\.exclude") as refused:
        prune(HardCoded(), EXAMPLE, PruneConfig())
    advice = re.findall(r"exclude = (\[.*\]),", str(refused.value))
    prune(HardCoded(), EXAMPLE, PruneConfig(exclude=ast.literal_eval(advice[0])))


class FlattensByNumber(nn.Module):
    """A view before a linear layer, which reads two maps as one where the channels are halved."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.fc1 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Linear(64, 8)
        self.fc2 = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        x = torch.nn.functional.adaptive_avg_pool2d(self.conv(self.stem(x)).relu(), 2)
        return self.fc2(self.fc1(x.view(-1, 64)).relu())


def test_layer_before_a_hard_coded_view_is_named():
    with pytest.raises(ModelError, match=r"in the forward of 'fc1' .* compress\.prune\.exclude = \['conv'\],"):
        prune(FlattensByNumber(), torch.cat([EXAMPLE, EXAMPLE]), PruneConfig(round_to=1))
    pruned = prune(FlattensByNumber(), EXAMPLE, PruneConfig(round_to=1, exclude=("conv",)))
    assert pruned.model.stem.out_channels == 4


@pytest.mark.parametrize("shuffle", [Shuffled(), nn.ChannelShuffle(2)])
def test_shuffled_channels_stay(shuffle):
    after = [nn.Conv2d(16, 8, 3), nn.Conv2d(8, NUM_CLASSES, 6), nn.Flatten()]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), shuffle, *after)
    pruned = prune(model, EXAMPLE, PruneConfig(round_to=1))
    shuffled = "its channels are shuffled, or split over more axes and joined again"
    assert pruned.excluded == {"0": shuffled, "3": "it writes the logits"}
    assert record_widths(pruned.model)["2"] == {"in_channels": 16, "out_channels": 4, "groups": 1}


def shufflenet() -> nn.Module:
    return build_model(ModelConfig(name="shufflenet_v2"), num_classes=5, in_channels=3, image_size=(32, 32), seed=0)


def swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=NUM_CLASSES)


@pytest.mark.parametrize("make", [shufflenet, swin])
def test_untrackable_channels_are_an_error(make):
    with pytest.raises(ModelError, match=r"cannot follow its channels.* prune\.kind"):
        prune(make(), torch.zeros(1, 3, 32, 32), PruneConfig())


def test_module_where_a_pruned_model_fails_is_named():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), HardCoded())
    with pytest.raises(ModelError, match=r"does not run .*, in the forward of '1' \(HardCoded\): it relies on"):
        prune(model, EXAMPLE, PruneConfig())


def test_excluded_layers_are_listed():
    assert prune(build("residual"), EXAMPLE, PruneConfig()).excluded == {"fc": "it writes the logits"}
    assert prune(build("depthwise"), EXAMPLE, PruneConfig(exclude=("expand",))).excluded == {
        "expand.0": "named in prune.exclude",
        "depthwise.0": "its channels meet those of 'expand.0': named in prune.exclude",
        "classifier.2": "it writes the logits",
    }


def test_unprunable_model_error_lists_reasons():
    with pytest.raises(ModelError, match=r"no layer .* \(stem\.0: its channels meet those of 'project\.0': named in"):
        prune(build("depthwise"), EXAMPLE, PruneConfig(exclude=("expand", "project.0")))


class Unused(Residual):
    """A network with a depthwise convolution on the image itself, and a layer that no forward calls."""

    def __init__(self):
        super().__init__()
        self.color, self.spare = nn.Conv2d(3, 3, 1, groups=3), nn.Linear(4, 4)

    def forward(self, x):
        return super().forward(self.color(x))


def test_image_channels_and_unused_layers_stay():
    pruned = prune(Unused(), EXAMPLE, PruneConfig())
    assert pruned.excluded == {
        "fc": "it writes the logits",
        "color": "its channels are the image's, which 'color' reads one by one",
        "spare": "the forward does not call it",
    }


def vision_transformer() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(16, 4, 2, 2, 32, 64, num_classes=NUM_CLASSES)
    nn.init.normal_(model.heads.head.weight)  # zeros at the start
    return model


@pytest.mark.parametrize("config", [PruneConfig(), PruneConfig(ratio=0.2, budget="parameters", scope="global")])
def test_transformer_loses_only_mlp_hidden_channels(config):
    model, example = vision_transformer(), torch.zeros(2, 3, 16, 16)
    pruned = prune(model, example, config)
    full, widths = record_widths(model), record_widths(pruned.model)
    changed = {path for path in full if full[path] != widths[path]}
    assert changed and all(".mlp." in path for path in changed)
    block = "encoder.layers.encoder_layer_0"
    layers = [path for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert list(pruned.excluded) == [path for path in layers if not path.endswith(".mlp.0")]
    assert pruned.excluded["heads.head"] == "it writes the logits"
    assert (
        pruned.excluded[f"{block}.self_attention.out_proj"] == f"it is part of the attention '{block}.self_attention'"
    )
    for path in ("conv_proj", f"{block}.mlp.3"):
        assert pruned.excluded[path].startswith("its channels reach the ")


def test_pruned_transformer_trains_and_is_rebuilt():
    model = prune(vision_transformer(), torch.zeros(1, 3, 16, 16), PruneConfig()).model
    batch = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model.train()(batch).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    again = apply_widths(vision_transformer(), record_widths(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(batch), model.eval()(batch))


def test_wrong_example_shape_is_an_error():
    with pytest.raises(ModelError, match=r"does not run on an input of shape \[1, 4, 8, 8\]"):
        prune(build("residual"), torch.zeros(1, 4, 8, 8), PruneConfig())


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"epochs_per_step": 0},
        {"importance_batches": 0},
        {"kind": "4:2"},
        {"budget": "bytes"},
        {"ratio": 0.0},
        {"ratio": 1.0},
        {"round_to": 0},
        {"max_ratio": 1.5},
        {"scope": "net"},
    ],
)
def test_settings_out_of_range_are_errors(wrong):
    with pytest.raises(RecipeError):
        PruneConfig(**wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "2:4", "ratio": 0.7}, "half of every layer"),
        ({"kind": "2:4", "steps": 2}, "leave out ratio, steps and scope"),
        ({"kind": "2:4", "scope": "global"}, "half of every layer"),
        ({"kind": "weights", "budget": "macs"}, "make no network smaller"),
        ({"kind": "weights", "importance": "taylor"}, "go by magnitude"),
        ({"kind": "2:4", "importance": "bn_scale"}, "go by magnitude"),
    ],
)
def test_contradictory_settings_are_errors(settings, message):
    with pytest.raises(RecipeError, match=message):
        PruneConfig(**settings)
