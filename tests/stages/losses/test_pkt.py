"""PKT: the reference code's number, and rows for which its gradient is not a number."""

import pytest
import torch
from loss_inputs import STUDENT_MAPS, STUDENT_VECTORS, TEACHER_VECTORS, drawn, said

from stages.forms import Wanted
from stages.losses.pkt import PKTConfig, pkt_loss
from stages.losses.said import Facts


def test_pkt_is_the_reference_codes_number():
    assert pkt_loss(STUDENT_VECTORS, TEACHER_VECTORS).item() == pytest.approx(0.004604792493, rel=1e-9)


def test_pkt_is_the_divergence_of_neighbours():
    student, teacher = drawn(3, 2, seed=1), drawn(3, 4, seed=2)
    total = 0.0
    for i in range(3):
        units = [[row / (row.norm() + 1e-7) for row in side] for side in (student, teacher)]
        kernels = [torch.stack([(side[i] @ side[j] + 1) / 2 for j in range(3)]) for side in units]
        of_student, of_teacher = (kernel / kernel.sum() for kernel in kernels)
        total += sum(of_teacher * ((of_teacher + 1e-7) / (of_student + 1e-7)).log()) / 9
    assert pkt_loss(student, teacher).item() == pytest.approx(float(total), rel=1e-12)


def test_the_gradient_equals_finite_differences():
    student, teacher = drawn(4, 3, seed=1).requires_grad_(), drawn(4, 5, seed=2)
    assert torch.autograd.gradcheck(lambda vectors: pkt_loss(vectors, teacher), student)


def test_student_equal_to_teacher_is_0_and_flat():
    student = TEACHER_VECTORS.clone().requires_grad_()
    loss = pkt_loss(student, TEACHER_VECTORS)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() < 1e-8  # the eps in the logarithm moves the minimum by as much


EDGES = {
    "a batch of one": torch.ones(1, 4),
    "one zero": torch.zeros(1, 4),
    "a zero row": torch.tensor([[0.0, 0, 0], [0, 1, 0], [1, 2, 3], [2, 1, 0]]),
    "zero rows": torch.zeros(4, 3),
    "opposite rows": torch.tensor([[1.0, 2], [-1, -2]]),
    "large rows": torch.full((4, 3), 3e4),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("edge", EDGES)
def test_loss_and_gradient_are_finite_at_the_edges(edge, dtype):
    student = EDGES[edge].clone().to(dtype).requires_grad_()
    loss = 30000 * pkt_loss(student, drawn(len(student), 5, seed=2))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert loss.dtype == torch.float32


def test_the_term_is_the_sum_over_pairs_of_pooled_layers():
    config = PKTConfig(loss="pkt", layers=(("a", "b"), ("c", "b")))
    shapes = {"a": (16, 8, 8), "c": (16,)}
    wanted = Wanted("b", "pooled")
    assert (config.weight, config.per_sample, config.student_layers()) == (30000.0, False, ("a", "c"))
    assert config.wants(shapes) == (wanted, wanted)
    term = config.build(shapes, {wanted: (32,)}, Facts(100, 10))
    loss = term(said(student={"a": STUDENT_MAPS, "c": STUDENT_VECTORS}, teacher={wanted: TEACHER_VECTORS}))
    expected = sum(pkt_loss(side, TEACHER_VECTORS) for side in (STUDENT_MAPS.mean((2, 3)), STUDENT_VECTORS))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
