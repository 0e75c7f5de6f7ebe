"""Tests of channel importance against formulas."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.tiny_nets import EXAMPLE, build, images
from torch import nn
from torch.nn import functional as F

from kdpipe.stages.compress.pruning.channel_groups import find_channels, traceable
from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.importance import attach_gradients, import_torch_pruning, measure_of
from kdpipe.stages.compress.pruning.prune import prune
from kdpipe.stages.compress.pruning.widths import record_widths
from kdpipe.stages.errors import ModelError


def importances(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """Return the importance of each group's channels, by the layer it is found from."""
    widths = record_widths(model)
    with traceable(model):
        channels = find_channels(
            model, EXAMPLE, (), measure_of(kind), full_widths=widths, with_batch_norm=kind == "bn_scale"
        )
    return {group.path: group.importance.float() for group in channels.groups}


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    batch, labels = images(20)
    loss = F.cross_entropy(model.eval()(batch), labels)
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def test_l1_averages_filter_scale_and_reading_weights():
    model = build("residual").requires_grad_(False)
    block = model.layer2[0]
    written, read = block.conv1.weight.abs().sum(dim=(1, 2, 3)), block.conv2.weight.abs().sum(dim=(0, 2, 3))
    expected = (written + read + block.bn1.weight.abs()) / 3
    torch.testing.assert_close(importances(model, "l1")["layer2.0.conv1"], expected)


def test_l2_is_the_root_mean_square_sum():
    model = build("residual").requires_grad_(False)
    block = model.layer2[0]
    written, read = block.conv1.weight.square().sum(dim=(1, 2, 3)), block.conv2.weight.square().sum(dim=(0, 2, 3))
    expected = ((written + read + block.bn1.weight.square()) / 3).sqrt()
    torch.testing.assert_close(importances(model, "l2")["layer2.0.conv1"], expected)


def test_taylor_sums_weights_times_gradients():
    model = build("residual")
    gradients = gradients_of(model)
    attach_gradients(model, gradients)
    conv1, conv2 = ((gradients[f"layer2.0.{name}.weight"] * model.get_parameter(f"layer2.0.{name}.weight")).abs()
                    for name in ("conv1", "conv2"))  # fmt: skip
    expected = (conv1.sum(dim=(1, 2, 3)) + conv2.sum(dim=(0, 2, 3))) / 2
    torch.testing.assert_close(importances(model, "taylor")["layer2.0.conv1"], expected.detach())


def test_bn_scale_averages_batch_norms_of_a_group():
    model = build("residual").requires_grad_(False)
    with torch.no_grad():
        model.stem[1].weight.neg_()
    found = importances(model, "bn_scale")
    stream = (model.stem[1].weight.abs() + model.layer1[0].bn2.weight + model.layer1[1].bn2.weight) / 3
    assert any(torch.allclose(importance, stream) for path, importance in found.items() if len(importance) == 16)
    torch.testing.assert_close(found["layer2.0.conv1"], model.layer2[0].bn1.weight)


def test_bn_scale_of_depthwise_group_uses_both_norms():
    model = build("depthwise").requires_grad_(False)
    (expected,) = [importance for importance in importances(model, "bn_scale").values() if len(importance) == 32]
    torch.testing.assert_close(expected, (model.expand[1].weight + model.depthwise[1].weight) / 2)


class FlatNorm(nn.Module):
    """A batch norm behind a flattened map: four pixels of a channel, four scales."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 7, 1), nn.BatchNorm1d(32), nn.Linear(32, 5)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x).flatten(1)))


def test_bn_scale_after_flatten_sums_over_pixels():
    model = FlatNorm().requires_grad_(False)
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    found = importances(model, "bn_scale")["conv"]
    torch.testing.assert_close(found, model.norm.weight.view(8, 4).sum(dim=1))


def test_lanes_of_grouped_conv_share_one_score():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(8, 5)
    ).requires_grad_(False)
    first, grouped = model[0].weight.abs().flatten(1).sum(dim=1), model[1].weight.abs().flatten(1).sum(dim=0)
    expected = (first.view(2, 4).mean(dim=0) + grouped) / 2
    torch.testing.assert_close(importances(model, "l1")["0"], expected)


def test_taylor_removes_the_least_important():
    model = build("plain").eval()
    gradients = {path: torch.zeros_like(parameter) for path, parameter in model.named_parameters()}
    strong = [2, 3, 7, 11]
    gradients["stage1.0.weight"][strong] = 1.0
    del gradients["fc.weight"]  # a frozen layer has none
    config = PruneConfig(ratio=0.75, round_to=1, importance="taylor")
    pruned = prune(model, EXAMPLE, config, gradients=gradients).model
    assert torch.equal(pruned.stage1[0].weight, model.stage1[0].weight[strong])
    assert all(parameter.grad is None for parameter in [*model.parameters(), *pruned.parameters()])


def test_group_without_batch_norm_is_excluded():
    pruned = prune(build("preactivation"), EXAMPLE, PruneConfig(importance="bn_scale"))
    assert pruned.excluded == {"fc": "it writes the logits"}
    with pytest.raises(ModelError, match=r"stage1\.0: no batch norm in its group"):
        prune(build("plain"), EXAMPLE, PruneConfig(importance="bn_scale"))


def test_taylor_without_gradients_is_an_error():
    with pytest.raises(ModelError, match=r"needs the gradients"):
        prune(build("plain"), EXAMPLE, PruneConfig(importance="taylor"))


def test_gradients_of_another_network_are_an_error():
    model = build("plain")
    with pytest.raises(ModelError, match=r"gradient of 'fc\.weight' has the shape \[3\]"):
        prune(model, EXAMPLE, PruneConfig(importance="taylor"), gradients={"fc.weight": torch.zeros(3)})


def test_timm_is_not_imported_for_pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "try:\n    import timm\nexcept ImportError:\n    timm = None\n"
    (tmp_path / "torch_pruning.py").write_text(text)
    (tmp_path / "timm.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torch_pruning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    del sys.modules["torch_pruning"]  # the fake is removed again after the test

    assert import_torch_pruning().timm is None
    assert "timm" not in sys.modules
