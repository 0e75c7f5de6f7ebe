"""Tests of averaged weights: formula, what is evaluated and returned, resuming, optimizers with two sets of weights."""

from dataclasses import replace

import pytest
import torch
from support.device import DEVICE
from support.tiny_training import STEPS, equal_weights, tiny_job, tiny_network, trained, trained_in_pieces
from torch import nn

from kdpipe.stages.errors import RunError
from kdpipe.stages.evaluation.evaluate import evaluate
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.training.checkpoint import Progress, save_checkpoint
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.optimization.averaging import WeightAverage
from kdpipe.stages.training.set_up import set_up

TWO_SETS = """
import torch

class Switching(torch.optim.SGD):
    "Evaluates half of the weights that it trains; halving does not restore the last bit of each number."

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.param_groups[0]["mode"] = "eval"

    def train(self):
        self._scale("train", 3.0)

    def eval(self):
        self._scale("eval", 1 / 3)

    @torch.no_grad()
    def _scale(self, mode, factor):
        if self.param_groups[0]["mode"] != mode:
            self.param_groups[0]["mode"] = mode
            for one in self.param_groups[0]["params"]:
                one.mul_(factor)

    def step(self, closure=None):
        assert self.param_groups[0]["mode"] == "train"
        return super().step(closure)
"""


def test_average_equals_its_formula():
    model, weights = nn.Linear(2, 1, bias=False), []
    average = WeightAverage(model, 0.5)
    wanted = model.weight.detach().double()
    for step in range(20):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[float(step), -1.0]]))
        weights.append(model.weight.detach().clone())
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * weights[-1].double()
    assert torch.allclose(average.tensors["weight"].double(), wanted, rtol=1e-5)
    assert torch.equal(model.weight, weights[-1])


def test_averaged_network_is_evaluated_and_returned(tmp_path):
    """Recomputed here from the weights after each step, which `after_step` sees."""
    seen = []
    model = tiny_network()

    def record(network):
        seen.append({name: one.clone() for name, one in network.state_dict().items()})

    job = replace(tiny_job(tmp_path / "run", model, ema_decay=0.9, precision="float32"), after_step=record)
    history = train(job, DEVICE, RunMonitor())
    assert len(seen) == STEPS
    expected = tiny_network().to(DEVICE).state_dict()
    for step, state in enumerate(seen):
        decay = min(0.9, (1 + step) / (10 + step))
        for name, one in state.items():
            expected[name] = torch.lerp(expected[name], one, 1 - decay) if one.is_floating_point() else one
    assert all(torch.allclose(model.state_dict()[name], expected[name], atol=1e-6) for name in expected)
    assert not torch.equal(model[0].weight, seen[-1]["0.weight"])
    assert history[-1]["cross_entropy"] == pytest.approx(evaluate(model, job.test, DEVICE).to_json()["cross_entropy"])


def test_averaging_does_not_change_the_training(tmp_path):
    _, plain = trained(tmp_path / "plain")
    _, averaged = trained(tmp_path / "averaged", ema_decay=0.5)
    assert [line["losses"] for line in plain] == [line["losses"] for line in averaged]
    assert plain[-1]["cross_entropy"] != averaged[-1]["cross_entropy"]


def test_resumed_average_is_bit_identical(tmp_path):
    whole, lines = trained(tmp_path / "whole", ema_decay=0.9, optimizer="adamw")
    pieces, same_lines = trained_in_pieces(tmp_path / "pieces", ema_decay=0.9, optimizer="adamw")
    assert equal_weights(whole, pieces)
    assert lines == same_lines


def test_finished_checkpoint_gives_the_average_again(tmp_path):
    once, _ = trained(tmp_path, ema_decay=0.9)
    again, _ = trained(tmp_path, ema_decay=0.9)
    assert equal_weights(once, again)


def test_average_of_another_network_is_refused(tmp_path):
    job = tiny_job(tmp_path, tiny_network(), ema_decay=0.9)
    state = set_up(job, DEVICE)
    del state.average.tensors["0.bias"]
    save_checkpoint(job.job_dir.checkpoint, state, Progress())
    with pytest.raises(RunError, match="average of weights belongs to another network"):
        trained(tmp_path, ema_decay=0.9)


def test_masked_weights_stay_zero_in_the_average(tmp_path):
    model = tiny_network()
    with torch.no_grad():
        model[4].weight[:, ::2] = 0
    job = tiny_job(tmp_path, model, ema_decay=0.9, optimizer="adam", clip_grad=1.0)
    job = replace(job, after_step=lambda network: network[4].weight.data[:, ::2].zero_())
    train(job, DEVICE, RunMonitor())
    assert not model[4].weight[:, ::2].any()
    assert model[4].weight[:, 1::2].all()


def test_optimizer_with_two_sets_of_weights(tmp_path, monkeypatch):
    (tmp_path / "switching.py").write_text(TWO_SETS)
    monkeypatch.chdir(tmp_path)
    name = "python:switching:Switching"
    whole, lines = trained(tmp_path / "whole", optimizer=name)
    pieces, same_lines = trained_in_pieces(tmp_path / "pieces", optimizer=name)
    assert equal_weights(whole, pieces)
    assert lines == same_lines
    in_training = load_tensors(tmp_path / "whole" / "checkpoint.safetensors")[0]["modules/student.0.weight"]
    assert torch.allclose(3 * whole[0].weight.cpu(), in_training)
