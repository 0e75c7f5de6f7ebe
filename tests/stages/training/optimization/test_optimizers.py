"""Tests of optimizers by name: all of them train, resume bit for bit, or are refused in one sentence."""

import pytest
import torch
from support.tiny_training import equal_weights, tiny_network, trained, trained_in_pieces
from torch import nn

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.training.optim import TrainConfig, build_optimizer
from kdpipe.stages.training.optimization.optimizers import OPTIMIZERS, find_optimizer

TIMM = ["timm:lamb", "timm:lion", "timm:adopt", "timm:adafactorbv", "timm:muon"]

OWN = """
import torch

def factory(params, lr, weight_decay=1.0, scale=1, **others):
    assert not others, others
    return torch.optim.SGD(params, lr=lr * scale, weight_decay=weight_decay)

class Odd(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["odd"] = object()

def no_optimizer(params):
    return 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own in the current folder."""
    (tmp_path / "own_optimizers.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_optimizers", raising=False)
    return tmp_path / "own_optimizers.py"


def built(**config):
    return build_optimizer(TrainConfig(**config), nn.ModuleDict({"student": tiny_network()}))


@pytest.mark.parametrize("name", [*OPTIMIZERS.builtin, *TIMM])
def test_each_optimizer_trains_and_resumes_exactly(tmp_path, name):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    whole, lines = trained(tmp_path / "whole", optimizer=name)
    pieces, same_lines = trained_in_pieces(tmp_path / "pieces", optimizer=name)
    assert equal_weights(whole, pieces)
    assert lines == same_lines
    assert not torch.equal(whole[0].weight, tiny_network()[0].weight)


def test_optimizer_gets_only_keywords_that_it_names():
    adam = built(optimizer="adam", betas=(0.8, 0.95), momentum=0.5, weight_decay=0.1)
    assert (adam.defaults["betas"], adam.defaults["weight_decay"]) == ((0.8, 0.95), 0.1)
    assert built(optimizer="adam").defaults["betas"] == (0.9, 0.999)
    assert built(optimizer="rmsprop", momentum=0.5).defaults["momentum"] == 0.5
    assert built(optimizer="adafactor", optimizer_args={"eps": [1e-30, 1e-2]}).defaults["eps"] == (1e-30, 1e-2)
    assert built(optimizer="sgd", nesterov=True, momentum=0.0).defaults["nesterov"] is False


def test_timm_optimizers_keep_their_defaults():
    pytest.importorskip("timm")
    assert built(optimizer="timm:momentum").defaults["nesterov"] is False
    assert built(optimizer="timm:nesterov").defaults["nesterov"] is True
    assert built(optimizer="timm:lamb").defaults["betas"] == (0.9, 0.999)


def test_own_optimizer_gets_only_what_it_names(own, tmp_path):
    optimizer = built(optimizer="python:own_optimizers:factory", lr=0.5, optimizer_args={"scale": 2})
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1.0, 5e-4)
    trained(tmp_path / "run", optimizer="python:own_optimizers:factory")


def test_registered_optimizer_is_found(monkeypatch):
    monkeypatch.setattr(OPTIMIZERS, "_registered", {})

    @OPTIMIZERS.register
    def half(params, lr):
        return torch.optim.SGD(params, lr=lr / 2)

    assert built(optimizer="half", lr=0.5).defaults["lr"] == 0.25


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"optimizer": "adamm"}, "there is no optimizer 'adamm'; did you mean 'adam'"),
        ({"optimizer": "lbfgs"}, "'lbfgs' cannot be used: it evaluates the loss several times"),
        ({"optimizer": "python:torch.optim:LBFGS"}, "LBFGS' cannot be used: it evaluates the loss several times"),
        ({"optimizer": "muon"}, "'timm:muon' trains the other weights"),
        ({"optimizer": "adam", "optimizer_args": {"epss": 1}}, "optimizer_args.epss: there is no such argument; did"),
        ({"optimizer": "adam", "optimizer_args": {"lr": 1}}, "optimizer_args.lr: leave it out"),
        ({"optimizer": "adam", "betas": (0.9,)}, r"'adam' cannot be built with .*betas=\(0.9,\)"),
        ({"optimizer": "python:own_optimizers:no_optimizer"}, "returned a int, not a torch.optim.Optimizer"),
    ],
)
def test_unusable_optimizer_is_refused_in_a_sentence(own, config, wanted):
    with pytest.raises(RecipeError, match=wanted):
        built(**config)


def test_unknown_and_unusable_timm_optimizers_are_refused():
    pytest.importorskip("timm")
    with pytest.raises(RecipeError, match="timm has no optimizer 'lionn'; did you mean 'lion'"):
        find_optimizer("timm:lionn")
    with pytest.raises(RecipeError, match="needs second derivatives"):
        built(optimizer="timm:adahessian")


def test_missing_timm_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm.optim", None)
    with pytest.raises(RecipeError, match=r"pip install 'kdpipe\[timm\]'"):
        find_optimizer("timm:lamb")


def test_state_that_no_checkpoint_can_hold_is_refused(own, tmp_path):
    with pytest.raises(RecipeError, match="Odd keeps a object in its state"):
        trained(tmp_path / "run", optimizer="python:own_optimizers:Odd")
