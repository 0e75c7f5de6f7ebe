"""Each loss uses its teacher, its samples and its weight."""

import dataclasses

import pytest
import torch
from support.loss_inputs import DATASET, LABELS, STUDENT_LOGITS, STUDENT_MAPS, TEACHER_LOGITS, TEACHER_MAPS, drawn

from kdpipe.stages.losses.distillation import build_distillation, required_of, student_layers
from kdpipe.stages.losses.features.hint import Hint
from kdpipe.stages.losses.logits.kd import KD, kd_loss
from kdpipe.stages.losses.registry import LOSSES
from kdpipe.stages.losses.relations.rkd import RKD
from kdpipe.stages.losses.relations.sp import SP
from kdpipe.stages.losses.sample_selection import SampleSelection
from kdpipe.stages.losses.schedules import Schedule, TrainProgress, value_at
from kdpipe.stages.losses.statistics.nst import NST
from kdpipe.stages.losses.weighted import DistillationBatch
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.targets.ensemble import TeacherEnsemble, TeachersConfig
from kdpipe.stages.targets.feature_spec import FeatureSpec, compute_statistic
from kdpipe.stages.targets.outputs import DenseTargets

START = TrainProgress(0, 10)
SECOND = 3 * drawn(8, 10, seed=5)
HINT = Hint(loss="hint", layers=(("a", "b"),))


def distillation(*configs, student=None, teachers=({},), seed=0, together=None):
    ensemble = TeacherEnsemble(together or TeachersConfig(), len(teachers))
    return build_distillation(configs, student or {}, teachers, ensemble=ensemble, dataset=DATASET, seed=seed)


def make_batch(*teachers, student=None, known=None, progress=START):
    outputs = [logits if isinstance(logits, DenseTargets) else DenseTargets(logits, {}) for logits in teachers]
    ranks = torch.arange(len(LABELS))
    known = known or [None] * len(outputs)
    return DistillationBatch(ModelOutput(STUDENT_LOGITS, student or {}), outputs, known, LABELS, ranks, progress, {})


def kd(**changes):
    return KD(loss="kd", weight=1.0, temperature=2.0, **changes)


def test_several_stores_are_averaged_by_their_logits():
    config = dataclasses.replace(kd(), weight=0.5)
    losses = distillation(config, teachers=({}, {}))(make_batch(TEACHER_LOGITS, SECOND))
    expected = 0.5 * kd_loss(STUDENT_LOGITS, (TEACHER_LOGITS + SECOND) / 2, 2.0).mean()
    assert losses["kd_0"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_loss_can_use_one_store():
    losses = distillation(kd(store=1), kd(store=0), teachers=({}, {}))(make_batch(TEACHER_LOGITS, SECOND))
    assert losses["kd_0"].item() == pytest.approx(kd_loss(STUDENT_LOGITS, SECOND, 2.0).mean().item(), rel=1e-9)
    assert losses["kd_1"].item() == pytest.approx(kd_loss(STUDENT_LOGITS, TEACHER_LOGITS, 2.0).mean().item(), rel=1e-9)


def test_hint_reads_its_store_and_its_adapter_trains():
    config = Hint(loss="hint", layers=(("a", "b"),), weight=2.0, store=1)
    terms = distillation(config, student={"a": (4, 6, 6)}, teachers=({}, {FeatureSpec("b"): (8, 6, 6)}))
    maps = {FeatureSpec("b"): torch.randn(8, 8, 6, 6)}
    batch = make_batch(TEACHER_LOGITS, DenseTargets(TEACHER_LOGITS, maps), student={"a": torch.randn(8, 4, 6, 6)})
    terms(batch)["hint_0"].backward()
    assert all(weight.grad is not None for weight in terms.parameters())
    assert any(weight.grad.abs().sum() > 0 for weight in terms.parameters())


def test_adapters_come_from_the_seed_alone():
    before = torch.random.get_rng_state()
    shapes = {"student": {"a": (3, 4, 4)}, "teachers": ({FeatureSpec("b"): (5, 4, 4)},)}
    first, second, third = (distillation(HINT, seed=seed, **shapes).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    weight = "losses.hint_0.loss.pairs.0.adapter.0.weight"
    assert torch.equal(first[weight], second[weight])
    assert not torch.equal(first[weight], third[weight])


def test_losses_list_their_required_layers():
    losses = [
        KD(loss="kd"),
        Hint(loss="hint", layers=(("a", "b"), ("c", "d"))),
        Hint(loss="hint", layers=(("a", "e"),), store=1),
    ]
    assert student_layers(losses) == ["a", "c"]
    assert required_of(losses, {}, 0) == [FeatureSpec("b"), FeatureSpec("d")]
    assert required_of(losses, {}, 1) == [FeatureSpec("e")]


def test_samples_without_targets_do_not_count():
    known = torch.tensor([True, False, True, True, False, True, False, False])
    losses = distillation(kd())(make_batch(TEACHER_LOGITS, known=[known]))
    each = kd_loss(STUDENT_LOGITS, TEACHER_LOGITS, 2.0)
    assert losses["kd_0"].item() == pytest.approx(each[known].sum().item() / 8, rel=1e-9)
    none_known = torch.zeros(8, dtype=torch.bool)
    assert float(distillation(kd())(make_batch(TEACHER_LOGITS, known=[none_known]))["kd_0"]) == 0


def test_hard_samples_have_the_lowest_label_probability():
    given = TEACHER_LOGITS.softmax(1)[torch.arange(8), LABELS]
    hard = given.argsort()[:3]
    losses = distillation(kd(samples=SampleSelection(filter="hard", fraction=0.3)))(make_batch(TEACHER_LOGITS))
    expected = kd_loss(STUDENT_LOGITS, TEACHER_LOGITS, 2.0)[hard].mean()  # the weight is not that of 3 of 8
    assert losses["kd_0"].item() == pytest.approx(expected.item(), rel=1e-9)


def test_correct_samples_are_those_the_teacher_gets_right():
    teacher = TEACHER_LOGITS.clone()
    teacher[torch.arange(3), LABELS[:3]] = 30.0
    right = teacher.argmax(1) == LABELS
    assert 3 <= right.sum() < 8
    losses = distillation(kd(samples=SampleSelection(filter="correct")))(make_batch(teacher))
    expected = kd_loss(STUDENT_LOGITS, teacher, 2.0)[right].mean()
    assert losses["kd_0"].item() == pytest.approx(expected.item(), rel=1e-9)
    wrong = torch.full((8, 10), 0.0).scatter(1, (LABELS[:, None] + 1) % 10, 9.0)
    assert float(distillation(kd(samples=SampleSelection(filter="correct")))(make_batch(wrong))["kd_0"]) == 0


def test_samples_without_targets_count_beside_selected_ones():
    known = torch.tensor([True, False, True, True, False, True, False, False])
    config = kd(samples=SampleSelection(filter="hard", fraction=0.5))
    losses = distillation(config)(make_batch(TEACHER_LOGITS, known=[known]))
    rows = known.nonzero()[:, 0]
    hard = rows[TEACHER_LOGITS.softmax(1)[rows, LABELS[rows]].argsort()[:2]]
    expected = kd_loss(STUDENT_LOGITS, TEACHER_LOGITS, 2.0)[hard].mean() * 4 / 8
    assert losses["kd_0"].item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("weighting", ["entropy", "certainty", "correctness"])
def test_samples_are_weighted_by_the_teachers_predictions(weighting):
    given = TEACHER_LOGITS.softmax(1)
    entropy = -(given * given.log()).sum(1) / torch.tensor(10.0).log()
    raw = {"entropy": entropy, "certainty": 1 - entropy, "correctness": given[torch.arange(8), LABELS]}[weighting]
    expected = (raw / raw.mean() * kd_loss(STUDENT_LOGITS, TEACHER_LOGITS, 2.0)).mean()
    losses = distillation(kd(samples=SampleSelection(weighting=weighting)))(make_batch(TEACHER_LOGITS))
    assert losses["kd_0"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_follow_their_schedules():
    fading = dataclasses.replace(kd(), weight=Schedule(start=1.0, end=0.0, shape="cosine", epochs=(2, 6)))
    whole = kd_loss(STUDENT_LOGITS, TEACHER_LOGITS, 2.0).mean().item()
    for epoch, weight in ((0, 1.0), (2, 1.0), (3, 0.853553), (4, 0.5), (6, 0.0), (9, 0.0), (float("inf"), 0.0)):
        loss = distillation(fading)(make_batch(TEACHER_LOGITS, progress=TrainProgress(epoch, 10)))["kd_0"]
        assert loss.item() == pytest.approx(weight * whole, rel=1e-5, abs=1e-12), epoch


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_schedule_with_equal_epochs_is_a_switch(shape):
    switch = Schedule(start=1.0, end=0.0, shape=shape, epochs=(2, 2))
    assert [value_at(switch, TrainProgress(epoch, 4)) for epoch in range(4)] == [1.0, 1.0, 0.0, 0.0]
    assert value_at(Schedule(start=1.0, end=0.5, epochs=(0, 0)), TrainProgress(0, 4)) == 0.5
    assert value_at(Schedule(start=1.0, end=0.5), TrainProgress(0, 1)) == 0.5


def test_standardized_logits_compose_with_a_loss():
    def standard(z):
        return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)

    losses = distillation(kd(standardize=True))(make_batch(TEACHER_LOGITS))
    expected = kd_loss(standard(STUDENT_LOGITS), standard(TEACHER_LOGITS), 2.0).mean()
    assert losses["kd_0"].item() == pytest.approx(expected.item(), rel=1e-9)


def test_every_loss_has_a_unique_name_a_paper_and_a_summary():
    for name, config in LOSSES.builtin.items():
        assert config.loss == name
        assert "20" in config.paper
        assert config.__doc__.strip()


def test_under_mixed_precision_losses_run_in_float32():
    """Autocast would change the products in SP's and NST's Gram matrices."""
    pairs = (("a", "b"),)
    configs = [
        kd(),
        Hint(loss="hint", layers=pairs, weight=1.0),
        NST(loss="nst", layers=pairs),
        SP(loss="sp", layers=pairs),
        RKD(loss="rkd", layers=pairs),
    ]
    shapes = {"a": (16, 8, 8)}
    required = required_of(configs, shapes, 0)
    given = {feature: compute_statistic(feature, TEACHER_MAPS.float()) for feature in required}
    stored = {feature: tuple(values.shape[1:]) for feature, values in given.items()}
    losses = distillation(*configs, student=shapes, teachers=(stored,)).eval()
    narrow = ModelOutput(STUDENT_LOGITS.bfloat16(), {"a": STUDENT_MAPS.bfloat16()})
    batch = dataclasses.replace(make_batch(DenseTargets(TEACHER_LOGITS.float(), given)), student=narrow)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = losses(batch)
    plain = losses(dataclasses.replace(batch, student=narrow.to_float32()))
    assert {name: loss.dtype for name, loss in mixed.items()} == dict.fromkeys(plain, torch.float32)
    assert {name: loss.item() for name, loss in mixed.items()} == {name: loss.item() for name, loss in plain.items()}
