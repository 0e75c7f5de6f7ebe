"""Tests of learning rates, optimizers and the order of samples."""

import pytest
import torch
from torch import nn

from kdpipe.stages.data.loader.sampling import batch_indices, epoch_order, num_steps
from kdpipe.stages.numerics import derive_seed
from kdpipe.stages.training.optim import TrainConfig, build_optimizer, learning_rate


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
    weights = [nn.Parameter(torch.ones(1))]
    sgd = build_optimizer(TrainConfig(momentum=0.8, nesterov=True, weight_decay=0.1), weights)
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"], sgd.defaults["weight_decay"]) == (0.8, True, 0.1)
    assert isinstance(build_optimizer(TrainConfig(optimizer="adamw"), weights), torch.optim.AdamW)


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
