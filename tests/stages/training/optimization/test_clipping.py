"""Tests of gradient clipping."""

from dataclasses import replace

import pytest
import torch
from support.device import DEVICE
from support.tiny_training import STEPS, tiny_job, tiny_network, trained
from torch import nn

from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.optimization.clipping import clip_gradients


def with_gradients():
    parameters = [nn.Parameter(torch.full((2, 2), 2.0)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))]
    parameters[0].grad, parameters[1].grad = torch.full((2, 2), 3.0), torch.tensor([0.1, -8.0])
    return parameters


def test_norm_of_all_gradients_is_limited():
    parameters = with_gradients()
    clip_gradients(parameters, 2.0, "norm")
    norm = torch.cat([one.grad.flatten() for one in parameters[:2]]).norm()
    assert norm == pytest.approx(2.0, rel=1e-5)
    assert parameters[0].grad[0, 0] / parameters[1].grad[1] == pytest.approx(-3 / 8)


def test_values_are_limited():
    parameters = with_gradients()
    clip_gradients(parameters, 0.5, "value")
    assert parameters[0].grad.unique().tolist() == [0.5]
    assert parameters[1].grad.tolist() == pytest.approx([0.1, -0.5])


def test_adaptive_clipping_is_relative_to_weights():
    pytest.importorskip("timm")
    parameters = with_gradients()
    clip_gradients(parameters, 0.1, "agc")
    assert torch.allclose(parameters[0].grad.norm(dim=1), 0.1 * parameters[0].norm(dim=1))


@pytest.mark.parametrize("mode", ["norm", "value"])
def test_training_clips_the_gradient_of_the_whole_batch(tmp_path, mode):
    model, norms = tiny_network(), []
    order = 2.0 if mode == "norm" else torch.inf

    def record(network):
        norms.append(float(torch.cat([one.grad.flatten() for one in network.parameters()]).norm(order)))

    job = replace(tiny_job(tmp_path, model, clip_grad=1e-3, clip_grad_mode=mode), after_step=record)
    train(job, DEVICE, RunMonitor())
    assert norms == pytest.approx([1e-3] * STEPS, rel=1e-2)
    unclipped, _ = trained(tmp_path / "unclipped")
    assert not torch.equal(model[0].weight, unclipped[0].weight)
