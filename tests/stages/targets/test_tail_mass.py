"""The mass of the classes that top-k logits do not keep is reported, and need not be charged to a student."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from support.loss_inputs import drawn
from support.tiny_run import CACHE, STUDENT, tiny_context
from torch import nn

from kdpipe.pipeline.steps import cache_teacher
from kdpipe.stages.distillation.compatibility import temperatures_of
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.losses.distillation import build_distillation
from kdpipe.stages.losses.inputs import DatasetInfo
from kdpipe.stages.losses.logits.dist import DIST
from kdpipe.stages.losses.logits.dkd import DKD
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.losses.logits.mlld import MLLD
from kdpipe.stages.losses.logits.nkd import NKD
from kdpipe.stages.losses.relations.pkt import PKT
from kdpipe.stages.losses.schedules import FINISHED, Schedule
from kdpipe.stages.losses.weighted import DistillationBatch
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.runtime.events import WARNING, RunMonitor
from kdpipe.stages.targets.ensemble import TeacherEnsemble, TeachersConfig
from kdpipe.stages.targets.outputs import TopKTargets
from kdpipe.stages.targets.tail_mass import measure_tails, report_tail
from kdpipe.store import TopK, default_temperatures, encode_topk
from kdpipe.store.format.encodings.topk import TAIL

LOGITS = 3 * drawn(64, 100, seed=1).float()
LABELS = torch.arange(64)
TOP_K = TopK(100, 10, default_temperatures())
PACKED = encode_topk(LOGITS.numpy(), TOP_K, "float32")


def targets():
    arrays = [torch.from_numpy(PACKED[f"logits/{name}"].astype(kind)) for name, kind in KINDS.items()]
    return TopKTargets(TOP_K, *arrays, {})


KINDS = {"values": "float32", "indices": "int64", "tail": "float32"}


def exact_mass(temperature):
    kept = (LOGITS / temperature).softmax(1).sort(1, descending=True).values[:, :10]
    return 1 - kept.sum(1).mean().item()


def charged(loss, num_teachers=1):
    """Return the loss of a student that is equal to the teacher."""
    config = TeachersConfig(ensemble="probabilities")
    losses = build_distillation(
        [loss],
        {},
        [{}] * num_teachers,
        ensemble=TeacherEnsemble(config, num_teachers),
        dataset=DatasetInfo(64, 100),
        seed=0,
    )
    student = LOGITS.clone().requires_grad_()
    teachers, masks = [targets()] * num_teachers, [None] * num_teachers
    batch = DistillationBatch(ModelOutput(student, {}), teachers, masks, LABELS, LABELS, FINISHED, {})
    (found,) = losses(batch).values()
    found.backward()
    return found.item(), student.grad


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_the_mass_of_the_rest_is_measured(temperature):
    (found,) = measure_tails([("distill.0 (kd)", temperature), ("distill.1 (kd)", 21.0)], TOP_K, PACKED[TAIL])
    assert found.mass == pytest.approx(exact_mass(temperature), abs=1e-3)


def test_more_than_a_fifth_is_a_warning():
    told = []
    monitor = RunMonitor(lambda event: told.append((event.unit == WARNING, event.job)))
    for found in measure_tails([("distill.0 (kd)", 1.0), ("distill.0 (kd)", 4.0)], TOP_K, PACKED[TAIL]):
        report_tail(found, "train-student", monitor)
    assert [is_warning for is_warning, _ in told] == [False, True]
    share = f"{100 * exact_mass(4.0):.0f}"
    assert told[1][1].startswith("distill.0 (kd): at T = 4 the 10 of 100 classes in the store have ")
    assert f"the rest {share}." in told[1][1]
    assert "raise cache.top_k" in told[1][1]


def test_temperatures_are_the_highest_of_each_loss():
    schedule = Schedule(start=8.0, end=2.0)
    losses = [KD(), KD(store=1), NKD(temperature=schedule), KD(rest="student"), PKT(layers=(("a", "b"),))]
    assert temperatures_of(losses, TeachersConfig(), 0) == [
        ("distill.0 (kd)", 4.0),
        ("distill.2 (nkd)", 1.0),
        ("distill.2 (nkd)", 8.0),
    ]
    own = TeachersConfig(temperatures=(3.0, 5.0))
    assert temperatures_of(losses[:2], own, 1) == [("distill.0 (kd)", 5.0), ("distill.1 (kd)", 4.0)]


@pytest.mark.parametrize("loss", [KD, DKD, DIST, MLLD])
@pytest.mark.parametrize("num_teachers", [1, 2])
def test_an_equal_student_is_charged_for_even_shares_alone(loss, num_teachers):
    even, _ = charged(loss(), num_teachers)
    own, gradient = charged(loss(rest="student"), num_teachers)
    assert even > 0.1
    assert abs(own) < 1e-3 * even
    assert gradient.abs().max() < 1e-4


def test_the_rest_of_the_student_compares_the_sum_of_all_others():
    """The value and the gradient are those of the divergence of k + 1 probabilities."""
    student = drawn(64, 100, seed=2).float().requires_grad_()
    loss = KD(weight=1.0, rest="student")(student, targets())
    classes = torch.from_numpy(PACKED["logits/indices"].astype(np.int64))
    soft = (student / 4).softmax(1).gather(1, classes)
    both = torch.cat([soft, 1 - soft.sum(1, keepdim=True)], 1)
    teacher = (LOGITS / 4).softmax(1).gather(1, classes)
    wanted = torch.cat([teacher, 1 - teacher.sum(1, keepdim=True)], 1)
    expected = 16 * (wanted * (wanted / both).log()).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    found, exact = (torch.autograd.grad(one, student, retain_graph=True)[0] for one in (loss, expected))
    assert (found - exact).norm() < 2e-3 * exact.norm()
    rows = torch.tensor([5, 2])
    spread = targets().with_rest_of(student)
    torch.testing.assert_close(spread.rows(rows).logits_at(4.0), spread.logits_at(4.0)[rows])


def test_a_student_is_warned_of_what_its_store_lacks(tmp_path):
    """The padding of the store's last shard does not count."""
    told = []
    context = tiny_context(tmp_path, RunMonitor(lambda event: told.append((event.unit == WARNING, event.job))))
    context = dataclasses.replace(context, views=dataclasses.replace(context.views, num_views=1))
    teacher = ModelBundle(Sharp(), {"name": "sharp"}, Normalization((0.5,), (0.5,)))
    cache_teacher(dataclasses.replace(CACHE, top_k=1), tmp_path / "store.zarr", teacher, [], context)
    losses = [KD(temperature=20.0), KD(temperature=1.0)]
    open_distillation([tmp_path / "store.zarr"], losses, STUDENT, {}, context)
    found = [(is_warning, text) for is_warning, text in told if "of 4 classes" in text]
    mass = [3 / (3 + math.exp(6 / temperature)) for temperature in (20.0, 1.0)]
    assert [is_warning for is_warning, _ in found] == [True, False]
    assert f"the rest {100 * mass[0]:.1f} %" in found[0][1]
    assert f"the rest {100 * mass[1]:.1f} %" in found[1][1]


class Sharp(nn.Module):
    """A teacher that gives the first class a logit of 6, and the others 0."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([6.0, 0, 0, 0]))

    def forward(self, images):
        return self.logits.expand(len(images), -1)
