"""The losses give the reference codes' numbers, in float64, and are safe at the edges."""

import pytest
import torch
from torch import nn

from stages.errors import RecipeError
from stages.features import Outputs
from stages.losses.hint import HintConfig, adapter, hint_loss
from stages.losses.kd import KDConfig, kd_loss
from stages.losses.terms import build_terms, student_layers, teacher_layers


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER = 3 * drawn(8, 10, seed=1), 3 * drawn(8, 10, seed=2)


@pytest.mark.parametrize(("temperature", "expected"), [(4.0, 8.079470496), (1.0, 4.635971995)])
def test_kd_is_the_reference_codes_number(temperature, expected):
    assert kd_loss(STUDENT, TEACHER, temperature).item() == pytest.approx(expected, rel=1e-9)


def test_hint_is_the_reference_codes_number():
    hint = hint_loss(drawn(8, 32, 8, 8, seed=9), drawn(8, 32, 8, 8, seed=10))
    assert hint.item() == pytest.approx(1.954606313, rel=1e-9)


def test_kd_gradient_equals_finite_differences():
    logits = STUDENT.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kd_loss(z, TEACHER, 4.0), logits)


def test_kd_does_not_depend_on_the_batch_being_cut():
    halves = (kd_loss(STUDENT[:4], TEACHER[:4], 4.0) + kd_loss(STUDENT[4:], TEACHER[4:], 4.0)) / 2
    assert halves.item() == pytest.approx(kd_loss(STUDENT, TEACHER, 4.0).item())


def test_kd_is_zero_and_flat_where_student_and_teacher_agree():
    logits = TEACHER.clone().requires_grad_()
    loss = kd_loss(logits, TEACHER, 4.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kd_of_saturated_logits_is_finite_in_every_precision(dtype):
    student = torch.tensor([[300.0, -300.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = kd_loss(student, torch.tensor([[-300.0, 300.0, 0.0]], dtype=dtype), 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss.item() == pytest.approx(600, rel=0.01)
    assert torch.isfinite(student.grad).all()


def outputs(logits, **features):
    return Outputs(logits, features)


def test_several_stores_teach_by_the_mean_of_their_logits():
    terms = build_terms([KDConfig(loss="kd", weight=0.5, temperature=2.0)], {}, [{}, {}], seed=0)
    second = 3 * drawn(8, 10, seed=5)
    loss = terms["kd_0"](outputs(STUDENT), [outputs(TEACHER), outputs(second)])
    expected = 0.5 * kd_loss(STUDENT, ((TEACHER + second) / 2).float(), 2.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_hint_reads_its_own_store_and_its_adapter_learns():
    config = HintConfig(loss="hint", layers=(("a", "b"),), weight=2.0, store=1)
    terms = build_terms([config], {"a": (4, 6, 6)}, [{}, {"b": (8, 6, 6)}], seed=0)
    student = outputs(STUDENT, a=torch.randn(8, 4, 6, 6))
    loss = terms["hint_0"](student, [outputs(TEACHER), outputs(TEACHER, b=torch.randn(8, 8, 6, 6))])
    loss.backward()
    assert all(weight.grad is not None for weight in terms.parameters())
    assert any(weight.grad.abs().sum() > 0 for weight in terms.parameters())


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((4, 8, 8), (16, 8, 8)),
        ((4, 8, 8), (16, 4, 4)),
        ((4, 4, 4), (16, 8, 8)),
        ((4, 9, 8), (6, 7, 7)),
        ((12,), (7,)),
    ],
)
def test_an_adapter_gives_the_teachers_shape(student, teacher):
    assert adapter(student, teacher)(torch.randn(3, *student)).shape == (3, *teacher)


@pytest.mark.parametrize(("student", "teacher"), [((4, 3, 3), (4, 8, 8)), ((4,), (4, 8, 8))])
def test_shapes_that_cannot_be_joined_are_named(student, teacher):
    with pytest.raises(RecipeError, match=str(list(student)).replace("[", r"\[") + ".*" + str(list(teacher))[1:-1]):
        adapter(student, teacher)


def test_adapters_come_from_the_seed_alone():
    config = HintConfig(loss="hint", layers=(("a", "b"),))
    before = torch.random.get_rng_state()
    one, two, three = (build_terms([config], {"a": (3, 4, 4)}, [{"b": (5, 4, 4)}], seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    weight = "hint_0.adapters.0.0.weight"
    assert torch.equal(one.state_dict()[weight], two.state_dict()[weight])
    assert not torch.equal(one.state_dict()[weight], three.state_dict()[weight])


def test_losses_say_which_layers_they_need():
    losses = [
        KDConfig(loss="kd"),
        HintConfig(loss="hint", layers=(("a", "b"), ("c", "d"))),
        HintConfig(loss="hint", layers=(("a", "e"),), store=1),
    ]
    assert student_layers(losses) == ["a", "c"]
    assert teacher_layers(losses, 0) == ["b", "d"]
    assert teacher_layers(losses, 1) == ["e"]
    assert isinstance(build_terms([losses[0]], {}, [{}], 0), nn.ModuleDict)
