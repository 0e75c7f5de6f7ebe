"""The tests' own store of exports tells networks apart that are exported differently."""

import copy
import sys

import torch
from support.export_cache import key_of
from torch import nn

SHAPE = torch.zeros(2, 4)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()


def test_equal_networks_share_an_export():
    assert key_of("onnx", network(), SHAPE, None) == key_of("onnx", network(), SHAPE, None) is not None


def test_weights_sharing_layers_and_settings_count():
    other_weight, tied, other_layer = network(), network(), network()
    with torch.no_grad():
        other_weight[0].bias[0] += 1e-6
        tied[2].weight.copy_(tied[0].weight)
        untied = copy.deepcopy(tied)
        tied[2].weight = tied[0].weight
    other_layer[1] = nn.ReLU6()
    networks = (network(), other_weight, untied, tied, other_layer)
    keys = [key_of("onnx", one, SHAPE, None) for one in networks]
    keys += [key_of(kind, network(), SHAPE, opset) for kind, opset in (("onnx", 17), ("pt2", None))]
    assert len({*keys}) == len(keys) and None not in keys


def test_code_of_users_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for factor in (1, 2):
        (tmp_path / "own_net_kept.py").write_text(
            f"from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return {factor} * x\n"
        )
        import own_net_kept

        keys.append(key_of("onnx", own_net_kept.Net(), SHAPE))
        del sys.modules["own_net_kept"]
    assert len({*keys}) == 2 and None not in keys


def test_what_cannot_be_told_apart_has_no_key():
    class Local(nn.Module):
        pass

    assert key_of("onnx", Local(), SHAPE) is None
