"""Tests of learning rates, optimizers and the order of samples, and of what decides a training."""

import dataclasses
import sys

import pytest
import torch
from support.tiny_run import TEACHER, TRAIN, StopAfter, tiny_context
from torch import nn

from kdpipe.pipeline.steps import train_teacher
from kdpipe.stages.config import config_fingerprint
from kdpipe.stages.data.loader.sampling import batch_indices, epoch_order, num_steps
from kdpipe.stages.errors import RecipeError, StoppedEarly
from kdpipe.stages.numerics import derive_seed
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.training.optim import TrainConfig, build_optimizer, check_training, idle_keys, learning_rate
from kdpipe.store import FingerprintMismatch


def test_cosine_warms_up_and_ends_near_zero():
    config = TrainConfig(epochs=10, lr=0.4, warmup_epochs=2)
    rates = [learning_rate(config, step, 5) for step in range(50)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[9] == pytest.approx(0.4)
    assert rates[10] == pytest.approx(0.4)
    assert rates[30] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_step_schedule_falls_at_milestones():
    config = TrainConfig(epochs=10, lr=1.0, schedule="step", milestones=(4, 7), gamma=0.1)
    rates = [learning_rate(config, step, 3) for step in range(30)]
    assert rates == pytest.approx([1.0] * 12 + [0.1] * 9 + [0.01] * 9)


def test_optimizers_match_their_names():
    weights = nn.ModuleDict({"student": nn.Linear(1, 1)})
    sgd = build_optimizer(TrainConfig(momentum=0.8, nesterov=True, weight_decay=0.1), weights)
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"], sgd.defaults["weight_decay"]) == (0.8, True, 0.1)
    assert len(sgd.param_groups) == 1
    assert isinstance(build_optimizer(TrainConfig(optimizer="adamw"), weights), torch.optim.AdamW)


def test_fingerprint_is_that_of_earlier_versions():
    """New keys count only where they are chosen: folders of finished jobs stay valid."""
    assert config_fingerprint(TrainConfig(optimizer="adamw", milestones=(3,))) == {
        "epochs": 20,
        "batch_size": 128,
        "optimizer": "adamw",
        "lr": 0.05,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "warmup_epochs": 0.0,
        "milestones": (3,),
        "gamma": 0.1,
        "precision": "auto",
    }


@pytest.mark.parametrize(
    "chosen",
    [
        {"betas": (0.9, 0.95)},
        {"optimizer_args": {"foreach": False}},
        {"decay_norm_and_bias": False},
        {"layer_decay": 0.9},
        {"schedule_args": {"power": 2.0}},
        {"min_lr": 0.01},
        {"clip_grad": 1.0},
        {"clip_grad_mode": "value"},
        {"ema_decay": 0.99},
        {"class_weights": "balanced"},
        {"class_weights": (1.0, 2.0)},
        {"sampler": "balanced"},
    ],
    ids=lambda chosen: next(iter(chosen)),
)
def test_a_chosen_key_is_part_of_the_fingerprint(chosen):
    assert config_fingerprint(TrainConfig(**chosen)) == {**config_fingerprint(TrainConfig()), **chosen}


OWN = """
import torch

def factory(params, lr):
    return torch.optim.SGD(params, lr=lr)

def schedule(lr):
    return lr
"""


@pytest.mark.parametrize("key", ["optimizer", "schedule"])
def test_edited_optimizer_or_schedule_is_refused(tmp_path, monkeypatch, key):
    module = tmp_path / f"edited_{key}.py"
    module.write_text(OWN)
    monkeypatch.chdir(tmp_path)
    name = f"python:edited_{key}:{'factory' if key == 'optimizer' else key}"
    config = dataclasses.replace(TEACHER, train=dataclasses.replace(TRAIN, **{key: name}))
    with pytest.raises(StoppedEarly):
        train_teacher(config, 0, tiny_context(tmp_path, RunMonitor(should_stop=StopAfter(3))))
    module.write_text(OWN + "# edited")
    monkeypatch.delitem(sys.modules, f"edited_{key}")  # as in another process
    with pytest.raises(FingerprintMismatch, match=f"train.{key}_source_sha256: stored"):
        train_teacher(config, 0, tiny_context(tmp_path))
    module.write_text(OWN)
    sys.modules.pop(f"edited_{key}")
    train_teacher(config, 0, tiny_context(tmp_path))


def test_check_names_the_key_of_the_recipe():
    config = TrainConfig(optimizer="sdg")
    with pytest.raises(RecipeError, match=r"^student.train.optimizer: there is no optimizer 'sdg'; did you mean 'sgd'"):
        check_training(config, "student.train", imports=False)
    own = TrainConfig(optimizer="python:absent:factory")
    check_training(own, "student.train", imports=False)
    with pytest.raises(RecipeError, match=r"^student.train.optimizer='python:absent:factory': the module absent"):
        check_training(own, "student.train", imports=True)


def test_idle_keys_are_named_with_the_reason():
    sgd = TrainConfig(betas=(0.5, 0.5), milestones=(3,), min_lr=0.01, clip_grad_mode="value")
    assert dict(idle_keys(sgd)) == {
        "betas": "optimizer = 'sgd'",
        "milestones": "schedule = 'cosine'",
        "clip_grad_mode": "no clip_grad",
    }
    rprop = TrainConfig(optimizer="rprop", weight_decay=0.1, momentum=0.5, nesterov=True, gamma=0.3, min_lr=0.01)
    assert list(dict(idle_keys(dataclasses.replace(rprop, schedule="step")))) == [
        "momentum",
        "nesterov",
        "weight_decay",
    ]
    assert list(dict(idle_keys(TrainConfig(schedule="constant", min_lr=0.01)))) == ["min_lr"]
    assert list(idle_keys(TrainConfig())) == []


def test_epoch_has_full_batches_of_distinct_samples():
    order = epoch_order(3, 4, 103)
    batches = [batch_indices(order, step, 10) for step in range(num_steps(103, 10))]
    assert [len(batch) for batch in batches] == [10] * 10
    assert len(torch.cat(batches).unique()) == 100
    assert torch.equal(order, epoch_order(3, 4, 103))
    assert not torch.equal(order, epoch_order(3, 5, 103))
    assert num_steps(7, 10) == 1
    assert len(batch_indices(epoch_order(0, 0, 7), 0, 10)) == 7


def test_seeds_for_different_purposes_differ():
    seeds = {derive_seed(seed, purpose, epoch) for seed in range(5) for purpose in "ab" for epoch in range(5)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)
