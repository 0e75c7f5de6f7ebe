"""The optimizer of DOT: its formula, its edges, and trainings that resume bit for bit."""

import dataclasses
from contextlib import suppress

import pytest
import torch
from support.tiny_run import STUDENT, TRAIN, StopAfter, make_tiny_store, open_tiny_spec, tiny_context
from torch import nn

from kdpipe.pipeline.steps import train_student
from kdpipe.stages.errors import RecipeError, StoppedEarly
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.train_student.student import StudentRun
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.optim import TrainConfig, build_optimizer
from kdpipe.stages.training.optimization import dot
from kdpipe.stages.training.optimization.dot import DOT

ONE = torch.ones(())


def test_velocities_are_those_of_the_paper():
    weight, adapter = (nn.Parameter(torch.tensor(value)) for value in ([1.0, -2.0], [0.5]))
    optimizer = DOT([weight, adapter], lr=0.1, momentum=0.9, weight_decay=0.01, delta=0.05)
    own, task, kd = weight.detach().clone(), torch.zeros(2), torch.zeros(2)
    other, velocity = adapter.detach().clone(), torch.zeros(1)
    for _ in range(4):
        optimizer.zero_grad()
        for share in (0.25, 0.75):  # two micro-batches
            labels, teacher = share * weight.square().sum(), share * (3 * weight.sum() + adapter.square().sum())
            optimizer.hold(8 * labels, 8 * teacher, 8 * ONE)
            (labels + teacher).backward()
        optimizer.step()
        task = 0.85 * task + 2 * own + 0.01 * own
        kd = 0.95 * kd + 3
        velocity = 0.9 * velocity + 2 * other + 0.01 * other
        own, other = own - 0.1 * (task + kd), other - 0.1 * velocity
    assert torch.allclose(weight, own, atol=1e-5)
    assert torch.allclose(adapter, other, atol=1e-5)


def test_steps_without_distillation_are_those_of_sgd():
    weights = [nn.Parameter(torch.arange(3.0)) for _ in range(2)]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = DOT([weights[0]], delta=0.05, **options), torch.optim.SGD([weights[1]], **options)
    for _ in range(3):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            optimizer.zero_grad()
            weight.pow(3).sum().backward()
            optimizer.step()
    assert torch.allclose(*weights)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer_args": {"delta": 0.1}}, "delta must be from 0 to momentum"),
        ({"clip_grad": 1.0}, "train.clip_grad"),
        ({"compile": True}, "train.compile"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    with pytest.raises(RecipeError, match=message):
        build_optimizer(TrainConfig(optimizer="dot", **config), nn.ModuleDict({"student": nn.Linear(2, 2)}))


def test_held_gradients_are_averaged_over_processes(monkeypatch):
    weight = nn.Parameter(torch.ones(2))
    optimizer = DOT([weight], lr=1.0, momentum=0.5, delta=0.25)
    optimizer.hold(weight.sum(), weight.square().sum(), ONE)
    monkeypatch.setattr(dot.dist, "all_reduce", lambda flat, group: flat.add_(3.0))  # that of the other process
    optimizer.average(2)
    weight.grad = torch.full((2,), 4.0)
    optimizer.step()
    state = optimizer.state[weight]
    assert (state[dot.TASK].tolist(), state[dot.DISTILLATION].tolist()) == ([2.0, 2.0], [2.0, 2.0])


def test_a_distilled_student_resumes_bit_for_bit(tmp_path):
    context, weights = tiny_context(tmp_path), {}
    spec = open_tiny_spec(make_tiny_store(context), context)
    for name, delta, stops in [("whole", 0.05, None), ("pieces", 0.05, 7), ("plain", 0.0, None)]:
        settings = dataclasses.replace(TRAIN, optimizer="dot", optimizer_args={"delta": delta})
        config, folder = dataclasses.replace(STUDENT, train=settings), JobDir(tmp_path / name)
        for _ in range(20):
            monitor = RunMonitor(should_stop=StopAfter(stops)) if stops else RunMonitor()
            run = StudentRun(folder, name, with_onnx=False)
            with suppress(StoppedEarly):
                train_student(config, 0, spec, dataclasses.replace(context, monitor=monitor), student_run=run)
                break
        weights[name] = folder.model.read_bytes()
    assert weights["whole"] == weights["pieces"] != weights["plain"]
