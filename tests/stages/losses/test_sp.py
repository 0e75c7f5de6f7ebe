"""SP: the reference code's number, layers of any shapes, and samples for which a layer is silent."""

import pytest
import torch
from loss_inputs import STUDENT_MAPS, STUDENT_VECTORS, TEACHER_MAPS, TEACHER_VECTORS, drawn, said

from stages.forms import Wanted
from stages.losses.said import Facts
from stages.losses.sp import SPConfig, sp_loss


def test_sp_is_the_reference_codes_number():
    assert sp_loss(STUDENT_MAPS, TEACHER_MAPS).item() == pytest.approx(0.0004444366941, rel=1e-9)


def test_sp_compares_normed_rows_of_products():
    student, teacher = drawn(3, 2, seed=1), drawn(3, 4, seed=2)
    total = 0.0
    for i in range(3):
        rows = [torch.stack([side[i] @ side[j] for j in range(3)]) for side in (student, teacher)]
        total += sum((rows[0] / rows[0].norm() - rows[1] / rows[1].norm()) ** 2) / 9
    assert sp_loss(student, teacher).item() == pytest.approx(float(total), rel=1e-12)


def test_the_gradient_equals_finite_differences():
    student, teacher = drawn(4, 2, 2, 1, seed=1).requires_grad_(), drawn(4, 5, seed=2)
    assert torch.autograd.gradcheck(lambda maps: sp_loss(maps, teacher), student)


def test_student_equal_to_teacher_is_0_and_flat():
    student = TEACHER_MAPS.clone().requires_grad_()
    loss = sp_loss(student, TEACHER_MAPS)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() < 1e-12


EDGES = {
    "a batch of one": torch.ones(1, 4),
    "one zero": torch.zeros(1, 4),
    "a zero row": torch.tensor([[0.0, 0, 0], [0, 1, 0], [1, 2, 3], [2, 1, 0]]),
    "zero maps": torch.zeros(4, 2, 3, 3),
    "large maps": torch.full((4, 2, 3, 3), 3e4),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("edge", EDGES)
def test_loss_and_gradient_are_finite_at_the_edges(edge, dtype):
    student = EDGES[edge].clone().to(dtype).requires_grad_()
    loss = 3000 * sp_loss(student, drawn(len(student), 5, seed=2))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert loss.dtype == torch.float32


def test_the_term_is_the_sum_over_pairs_of_whole_layers():
    config = SPConfig(loss="sp", layers=(("a", "b"), ("c", "d")))
    wanted, vectors = Wanted("b"), Wanted("d")
    shapes = {"a": (16, 8, 8), "c": (16,)}
    assert (config.weight, config.per_sample, config.student_layers()) == (3000.0, False, ("a", "c"))
    assert config.wants(shapes) == (wanted, vectors)
    term = config.build(shapes, {wanted: (32, 8, 8), vectors: (32,)}, Facts(100, 10))
    student, teacher = {"a": STUDENT_MAPS, "c": STUDENT_VECTORS}, {wanted: TEACHER_MAPS, vectors: TEACHER_VECTORS}
    expected = sp_loss(STUDENT_MAPS, TEACHER_MAPS) + sp_loss(STUDENT_VECTORS, TEACHER_VECTORS)
    assert term(said(student=student, teacher=teacher)).item() == pytest.approx(expected.item(), rel=1e-12)
