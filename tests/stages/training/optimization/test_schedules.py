"""Tests of learning-rate schedules by name."""

import pytest
from support.tiny_training import equal_weights, trained, trained_in_pieces

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.training.optim import TrainConfig, build_schedule, learning_rate
from kdpipe.stages.training.optimization.schedules import SCHEDULES

OWN = """
def falling(progress, lr, epochs, depth=1.0, **others):
    assert not others, others
    return lr * (1 - depth * progress)

def broken(lr):
    return -lr

def faulty(nothing):
    return nothing
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_schedules.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


def rates(count=100, **config):
    rate = build_schedule(TrainConfig(**{"epochs": 10, "lr": 1.0, **config}), count // 10)
    return [rate(step) for step in range(count)]


@pytest.mark.parametrize("name", ["cosine", "linear", "polynomial"])
def test_schedule_falls_from_lr_to_min_lr(name):
    found = rates(1000, schedule=name, min_lr=0.1)
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(0.1, abs=1e-3)
    assert learning_rate(TrainConfig(epochs=10, lr=1.0, schedule=name, min_lr=0.1), 1000, 100) == pytest.approx(0.1)


def test_values_of_schedules():
    assert rates(schedule="constant", warmup_epochs=1)[8:11] == pytest.approx([0.9, 1.0, 1.0])
    assert rates(schedule="linear")[50] == pytest.approx(0.5)
    assert rates(schedule="polynomial", schedule_args={"power": 2.0})[50] == pytest.approx(0.25)
    assert rates(schedule="cosine", min_lr=0.5)[50] == pytest.approx(0.75)
    assert rates(schedule="step", milestones=(2, 4), min_lr=0.05)[::20][:3] == pytest.approx([1.0, 0.1, 0.05])


def test_own_schedule_gets_only_what_it_names(own, tmp_path):
    found = rates(schedule="python:own_schedules:falling", schedule_args={"depth": 0.5}, warmup_epochs=5)
    assert (found[4], found[50], found[75]) == pytest.approx((0.1, 1.0, 0.75))
    config = {"schedule": "python:own_schedules:falling", "lr": 0.02}
    assert equal_weights(trained(tmp_path / "a", **config)[0], trained_in_pieces(tmp_path / "b", **config)[0])


def test_registered_schedule_is_found(monkeypatch):
    monkeypatch.setattr(SCHEDULES, "_registered", {})
    SCHEDULES.register("half")(lambda lr: lr / 2)
    assert rates(schedule="half")[7] == 0.5


@pytest.mark.parametrize("name", ["cosine", "tanh", "poly", "step", "multistep", "wsd", "rsqrt", "constant"])
def test_schedules_of_timm_are_functions_of_the_step(name):
    pytest.importorskip("timm")
    config = TrainConfig(epochs=10, lr=0.5, schedule=f"timm:{name}", warmup_epochs=2, min_lr=0.1, milestones=(5,))
    forward, backward = build_schedule(config, 10), build_schedule(config, 10)
    found = [forward(step) for step in range(100)]
    assert found == [backward(step) for step in reversed(range(100))][::-1]
    assert found[0] == pytest.approx(1e-5)
    assert max(found) <= 0.5
    assert min(found[20:]) >= 0.05 - 1e-9
    if name == "multistep":
        assert (found[48], found[50]) == pytest.approx((0.5, 0.05))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"schedule": "cosin"}, "there is no schedule 'cosin'; did you mean 'cosine'?"),
        ({"schedule": "cosine", "schedule_args": {"power": 1}}, "schedule_args.power: there is no such argument"),
        ({"schedule": "cosine", "schedule_args": {"lr": 1}}, "schedule_args.lr: leave it out"),
        ({"schedule": "python:own_schedules:broken"}, "returned -1.0"),
        ({"schedule": "python:own_schedules:faulty"}, "failed with .*nothing"),
    ],
)
def test_unusable_schedule_is_refused_in_a_sentence(own, config, wanted):
    with pytest.raises(RecipeError, match=wanted):
        rates(**config)


@pytest.mark.parametrize(
    ("name", "args", "wanted"),
    [
        ("cosin", {}, "timm:cosin.*it has cosine, tanh"),
        ("plateau", {}, "not a function of the step"),
        ("cosine", {"cycle_limt": 2}, "cycle_limt: there is no such argument; did you mean 'cycle_limit'"),
    ],
)
def test_unusable_schedule_of_timm_is_refused(name, args, wanted):
    pytest.importorskip("timm")
    with pytest.raises(RecipeError, match=wanted):
        rates(schedule=f"timm:{name}", schedule_args=args)


def test_min_lr_above_lr_is_refused():
    with pytest.raises(RecipeError, match="min_lr = 1 is above lr = 0.5"):
        TrainConfig(lr=0.5, min_lr=1.0)
