"""WKD-L against its formula, written a second time in float64 with the label's row and column cut out."""

import pytest
import torch
from support.loss_inputs import (
    LABELS,
    STUDENT_LOGITS,
    TEACHER_HEAD,
    TEACHER_LOGITS,
    assert_finite,
    build_loss,
    drawn,
    make_inputs,
)

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.logits.wkd import WKDL, class_costs, wkd_l_loss
from kdpipe.stages.targets.feature_spec import TEACHER_HEAD as HEAD

COSTS = class_costs(TEACHER_HEAD)


def expected(temperature, gamma, regularization, iterations):
    losses = []
    for student, teacher, label in zip(STUDENT_LOGITS, TEACHER_LOGITS, LABELS.tolist(), strict=True):
        others = [number for number in range(10) if number != label]
        source, target = ((logits[others] / temperature).softmax(0) for logits in (student, teacher))
        cost = COSTS[others][:, others]
        kernel, left = (-cost / regularization).exp(), torch.full_like(source, 1 / 9)
        for _ in range(iterations):
            right = target / (kernel.T @ left + 1e-8)
            left = source / (kernel @ right + 1e-8)
        moved = left[:, None] * kernel * right
        losses.append(gamma * (moved * cost).sum() - teacher.softmax(0)[label] * student.log_softmax(0)[label])
    return torch.stack(losses)


@pytest.mark.parametrize("settings", [(8.0, 600.0, 0.05, 10), (2.0, 30.0, 0.2, 3)])
def test_loss_is_the_formula(settings):
    temperature, gamma, regularization, iterations = settings
    keys = {"gamma": gamma, "regularization": regularization, "iterations": iterations}
    losses = wkd_l_loss(STUDENT_LOGITS, TEACHER_LOGITS, LABELS, COSTS, temperature, **keys)
    torch.testing.assert_close(losses, expected(*settings), rtol=1e-12, atol=0)
    module, inputs = build_loss(WKDL(temperature=temperature, **keys), {}, {"pre_logits:head": TEACHER_HEAD})
    assert torch.equal(module(inputs), losses)


def test_costs_are_sharpened_distances_of_rows():
    rows = TEACHER_HEAD[:, :-1]
    for one, other in ((0, 1), (3, 7)):
        cosine = torch.dot(rows[one], rows[other]) / (rows[one].norm() * rows[other].norm())
        assert COSTS[one, other].item() == pytest.approx((1 - torch.exp(cosine - 1)).item() + 1e-8)
        assert class_costs(TEACHER_HEAD, sharpen=0)[one, other].item() == pytest.approx((1 - cosine).item() + 1e-8)
    torch.testing.assert_close(COSTS, COSTS.T)
    assert COSTS.diagonal().max() < 2e-8


def test_moving_to_a_similar_class_costs_less():
    """Between class 1 and its near neighbor 2, and between class 1 and the far class 3."""
    head = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [-1.0, 0.0, 0.0]])
    teacher = torch.tensor([[0.0, 60.0, 0.0, 0.0]])
    near, far = (torch.zeros(1, 4).index_fill(1, torch.tensor([label]), 60.0) for label in (2, 3))
    label, costs = torch.tensor([0]), class_costs(head)
    assert 10 * wkd_l_loss(near, teacher, label, costs, 1.0) < wkd_l_loss(far, teacher, label, costs, 1.0)


@pytest.mark.parametrize("num_classes", [2, 3, 30])
@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_loss_and_gradient_are_finite(num_classes, scale):
    head = drawn(num_classes, 5, seed=3).float()
    head[-1] = 0  # a class without weights
    student, teacher = ((scale * drawn(8, num_classes, seed=seed)).float() for seed in (1, 2))
    student.requires_grad_()
    losses = wkd_l_loss(student, teacher.half().clamp(-6e4, 6e4), LABELS % num_classes, class_costs(head.half()))
    assert losses.dtype == torch.float32
    assert_finite(losses.mean(), student)


def test_gradient_matches_finite_differences():
    student = STUDENT_LOGITS[:3].clone().requires_grad_()
    function = lambda logits: wkd_l_loss(logits, TEACHER_LOGITS[:3], LABELS[:3], COSTS, gamma=1.0)  # noqa: E731
    assert torch.autograd.gradcheck(function, student)


def test_head_of_other_classes_is_an_error():
    with pytest.raises(RecipeError, match="last layer, which has 7, and the student has 10"):
        build_loss(WKDL(), {}, {"pre_logits:head": TEACHER_HEAD[:7]})
    assert WKDL().required_features({}) == (HEAD,)
    assert make_inputs().teacher.rows(torch.tensor([1])).logits.shape == (1, 10)
