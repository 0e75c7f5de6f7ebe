"""Gradients are sent during the backward pass, in the same order also where one is missing.

The other process is played by its all-reduce: it has the same gradients. Two real ones are in test_distributed.py.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdpipe.stages.errors import ModelError
from kdpipe.stages.runtime.distributed import SINGLE, ProcessGroup
from kdpipe.stages.training.optimization import gradients
from kdpipe.stages.training.optimization.gradients import GradientAverage

WIDTH = 4
BYTES = 4 * WIDTH * WIDTH


class Sent:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def all_reduce(self, tensor: Tensor, *arguments: Any, async_op: bool = False, group: Any = None) -> Any:
        if tensor.dtype is torch.float32:  # the flags of ProcessGroup.any stay as they are
            self.sizes.append(tensor.numel())
            tensor.mul_(2)
        return self

    def wait(self) -> None:
        pass


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sent]:
    fake = Sent()
    monkeypatch.setattr(gradients.dist, "all_reduce", fake.all_reduce)
    monkeypatch.setattr(gradients, "BUCKET_BYTES", BYTES)
    return fake


def layers(num: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num)))


def gradients_of(network: nn.Module) -> list[Tensor | None]:
    return [None if one.grad is None else one.grad.clone() for one in network.parameters()]


def backward(network: nn.Module) -> Tensor:
    loss = network(torch.ones(2, WIDTH)).square().sum()
    loss.backward()
    return loss.detach()


def test_gradients_are_sent_before_the_backward_pass_ends(sent: Sent) -> None:
    network = layers()
    backward(network)
    expected = gradients_of(network)
    network.zero_grad()
    average = GradientAverage(list(network.parameters()), ProcessGroup(0, 2))
    seen: list[int] = []
    network[0].weight.register_post_accumulate_grad_hook(lambda one: seen.append(len(sent.sizes)))
    with average.sent_early():
        loss = backward(network)
        assert sent.sizes == [BYTES // 4] * 3
    losses = average.finish({"kd": loss})
    assert seen[0] >= 2  # those of the later layers, before this one's was there
    assert losses["kd"] == loss
    for ours, one in zip(gradients_of(network), expected, strict=True):
        assert ours is not None
        assert one is not None
        assert torch.equal(ours, one)


def test_missing_gradient_is_sent_as_zeros_at_the_end(sent: Sent) -> None:
    network = layers()
    average = GradientAverage(list(network.parameters()), ProcessGroup(0, 2))
    with average.sent_early():
        loss = network[2](network[0](torch.ones(2, WIDTH))).sum()  # not the middle layer
        loss.backward()
        assert len(sent.sizes) == 1
    average.finish({"kd": loss.detach()})
    assert sent.sizes == [BYTES // 4] * 3 + [1]
    assert [one is None for one in gradients_of(network)] == [False, True, False]  # unused in both


def test_accumulated_gradients_are_sent_after_the_last(sent: Sent) -> None:
    network = layers(1)
    average = GradientAverage(list(network.parameters()), ProcessGroup(0, 2))
    losses = [backward(network) for _ in range(2)]
    expected = gradients_of(network)[0]
    assert sent.sizes == []
    average.finish({"kd": torch.stack(losses).sum()})
    assert sent.sizes == [BYTES // 4, 1]
    assert expected is not None
    assert network[0].weight.grad is not None
    assert torch.equal(network[0].weight.grad, expected)


def test_gradient_that_comes_twice_is_an_error(sent: Sent) -> None:
    network = layers(1)
    average = GradientAverage(list(network.parameters()), ProcessGroup(0, 2))
    rows = torch.ones(2, WIDTH, requires_grad=True)
    with average.sent_early(), pytest.raises(ModelError, match=r"shape \(4, 4\) got a gradient twice .* use_reentrant"):
        hidden = checkpoint(network, rows, use_reentrant=True)
        checkpoint(network, hidden, use_reentrant=True).sum().backward()


def test_parameters_keep_no_hooks(sent: Sent) -> None:
    network = layers()
    average = GradientAverage(list(network.parameters()), ProcessGroup(0, 2))
    assert network[0].weight._post_accumulate_grad_hooks
    del average
    gc.collect()
    assert not network[0].weight._post_accumulate_grad_hooks
    GradientAverage(list(network.parameters()), SINGLE)
    assert not network[0].weight._post_accumulate_grad_hooks
