"""Tests of packed optimizer states: anything that JSON and tensors hold comes back, damage is refused."""

import math

import pytest
import torch
from torch import nn

from kdpipe.stages.training.optimization.optimizer_state import pack_optimizer, unpack_optimizer

STATE = {
    "tensor": torch.arange(6.0).reshape(2, 3),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "wide": torch.ones(2, dtype=torch.float64) / 3,
    "count": 3,
    "nothing": None,
    "infinite": -math.inf,
    "flag": True,
    "nested": {"rows": [torch.ones(1), (1, 2.5, "text")], "empty": {}},
}


def optimizer_with(state=None, **group):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))], lr=0.1)
    optimizer.param_groups[0].update(group)
    if state:
        optimizer.state[optimizer.param_groups[0]["params"][1]] = dict(state)
    return optimizer


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_any_state_comes_back_exactly():
    tensors, record = pack_optimizer(optimizer_with(STATE, k=7, d=0.5, train_mode=True, lr=0.7))
    assert set(tensors) == {f"optimizer/1/{name}" for name in ("tensor", "half", "wide", "nested/rows/0")}
    restored = optimizer_with()
    unpack_optimizer(restored, tensors, record)
    group = restored.param_groups[0]
    assert same(restored.state[group["params"][1]], STATE)
    assert (group["k"], group["d"], group["train_mode"]) == (7, 0.5, True)
    assert group["lr"] == 0.1  # it is set before every step


def test_further_state_beside_parameters_comes_back():
    class Counting(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "random": (3, [1, 2], None)}

        def load_state_dict(self, state_dict):
            self.found = state_dict["random"]
            super().load_state_dict({key: value for key, value in state_dict.items() if key != "random"})

    one, other = (Counting([nn.Parameter(torch.zeros(2))], lr=0.1) for _ in range(2))
    unpack_optimizer(other, *pack_optimizer(one))
    assert other.found == (3, [1, 2], None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, record: tensors.update({"optimizer/1/tensor": torch.ones(3)}),
        lambda tensors, record: tensors.update({"optimizer/7/tensor": torch.ones(3)}),
        lambda tensors, record: tensors.pop("optimizer/1/half"),
        lambda tensors, record: record["state"]["dict"].update({"9": {"dict": {}}}),
        lambda tensors, record: record["state"]["dict"].update({"x": {"dict": {}}}),
        lambda tensors, record: record.pop("rest"),
        lambda tensors, record: record["groups"]["list"].append({"dict": {}}),
        lambda tensors, record: record.update(state=3),
        lambda tensors, record: record.update(state={"dict": 3}),
    ],
)
def test_damaged_state_is_refused(damage):
    tensors, record = pack_optimizer(optimizer_with(STATE))
    damage(tensors, record)
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
        unpack_optimizer(optimizer_with(), tensors, record)
