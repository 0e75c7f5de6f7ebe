"""Tests of rebuilding pruned networks from recorded widths."""

from __future__ import annotations

import json

import pytest
import torch
from support.tiny_nets import EXAMPLE, NETS, build, images
from torch import nn

from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.pruning.prune import prune
from kdpipe.stages.compress.pruning.widths import apply_widths, record_widths
from kdpipe.stages.errors import ModelError


@pytest.mark.parametrize("name", NETS)
def test_pruned_network_is_rebuilt_bit_for_bit(name):
    pruned = prune(build(name), EXAMPLE, PruneConfig(ratio=0.37, round_to=1)).model.eval()
    widths = json.loads(json.dumps(record_widths(pruned)))
    rebuilt = apply_widths(build(name, seed=1), widths).eval()
    rebuilt.load_state_dict(pruned.state_dict(), strict=True)
    batch, _ = images(4)
    assert torch.equal(rebuilt(batch), pruned(batch))
    assert record_widths(rebuilt) == widths


def test_every_layer_type_is_rebuilt():
    def network(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, width, 3, groups=1),
            nn.GroupNorm(2, width),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, groups=2),
            nn.Flatten(2),
            nn.Conv1d(width, width, 1, bias=False),
            nn.BatchNorm1d(width, affine=False),
            nn.Flatten(),
            nn.Linear(width * 16, width),
            nn.LayerNorm(width),
        )

    small = network(6).eval()
    rebuilt = apply_widths(network(10), record_widths(small)).eval()
    rebuilt.load_state_dict(small.state_dict(), strict=True)
    batch, _ = images(2)
    assert torch.equal(rebuilt(batch), small(batch))


def test_unpruned_widths_change_nothing():
    model = build("residual")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    apply_widths(model, record_widths(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def with_conv1(**sizes):
    widths = record_widths(build("residual"))
    widths["layer1.0.conv1"].update(sizes)
    return widths


def without(path):
    widths = record_widths(build("residual"))
    del widths[path]
    return widths


@pytest.mark.parametrize(
    ("widths", "sentence"),
    [
        ([], "list"),
        ({"layer1.0.convv1": {}}, "only one has the layer 'fc'"),
        (without("fc"), "only one has the layer 'fc'"),
        (with_conv1(out_channels=10**12), "at most 16"),
        (with_conv1(out_channels=0), "at least 1"),
        (with_conv1(out_channels=-3), "at least 1"),
        (with_conv1(out_channels=True), "whole numbers"),
        (with_conv1(out_channels=8.0), "whole numbers"),
        (with_conv1(out_channels="8"), "whole numbers"),
        (with_conv1(out_channels=[8]), "whole numbers"),
        (with_conv1(groups=17), "at most 1"),
        (with_conv1(kernel_size=1), "nothing else"),
        ({**record_widths(build("residual")), "fc": 7}, "'fc'"),
        ({**record_widths(build("residual")), "fc": {"in_features": 24}}, "out_features"),
    ],
)
def test_mismatched_record_is_an_error_and_changes_nothing(widths, sentence):
    model = build("residual")
    before = record_widths(model)
    with pytest.raises(ModelError, match=r"record of widths") as raised:
        apply_widths(model, widths)
    assert sentence in str(raised.value)
    assert record_widths(model) == before


def test_groups_must_divide_the_channels():
    model = build("depthwise")
    widths = record_widths(model)
    widths["depthwise.0"].update(in_channels=12, out_channels=12, groups=5)
    with pytest.raises(ModelError, match="5 unequal groups"):
        apply_widths(model, widths)


class Scaled(nn.Module):
    """Convolutions of which the second one's map meets parameters that are no layer's."""

    def __init__(self, position: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.position = nn.Parameter(torch.rand(1, 8, 8, 8)) if position else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.scale * self.second(self.first(images).relu())
        return self.head((maps if self.position is None else maps @ self.position).mean((2, 3)))  # type: ignore[no-any-return]


def test_parameters_beside_layers_are_cut_with_their_channels():
    model, example = Scaled().eval(), torch.rand(2, 3, 8, 8)
    pruned = prune(model, example, PruneConfig(round_to=1))
    widths = record_widths(pruned.model)
    assert widths["scale"] == {"channels": 4}
    kept = [channel for channel in range(8) if channel not in pruned.removed["second"]]
    assert torch.equal(pruned.model.scale, model.scale[kept])
    rebuilt = apply_widths(Scaled(), widths).eval()
    rebuilt.load_state_dict(pruned.model.state_dict())
    assert torch.equal(rebuilt(example), pruned.model(example))
    earlier = {path: sizes for path, sizes in record_widths(model).items() if path != "scale"}
    assert apply_widths(Scaled(), earlier).scale.shape == (8, 1, 1)
    with pytest.raises(
        ModelError, match="gives 'scale' channels = 9; expected whole numbers, at least 1 and at most 8"
    ):
        apply_widths(Scaled(), {**widths, "scale": {"channels": 9}})


def test_parameters_that_mix_positions_keep_their_channels():
    pruned = prune(Scaled(position=True), torch.rand(2, 3, 8, 8), PruneConfig(round_to=1))
    assert pruned.excluded["second"] == "its channels reach the parameter 'position'"
    assert record_widths(pruned.model)["first"]["out_channels"] == 4
