"""PKT matches the reference code and a loop implementation."""

import pytest
import torch
from support.loss_inputs import STUDENT_VECTORS, TEACHER_VECTORS, drawn

from kdpipe.stages.losses.relations.pkt import pkt_loss


def test_pkt_matches_the_reference_code():
    assert pkt_loss(STUDENT_VECTORS, TEACHER_VECTORS).item() == pytest.approx(0.004604792493, rel=1e-9)


def test_pkt_is_the_divergence_of_neighbors():
    student, teacher = drawn(3, 2, seed=1), drawn(3, 4, seed=2)
    total = 0.0
    for i in range(3):
        units = [[row / (row.norm() + 1e-7) for row in side] for side in (student, teacher)]
        kernels = [torch.stack([(side[i] @ side[j] + 1) / 2 for j in range(3)]) for side in units]
        of_student, of_teacher = (kernel / kernel.sum() for kernel in kernels)
        total += sum(of_teacher * ((of_teacher + 1e-7) / (of_student + 1e-7)).log()) / 9
    assert pkt_loss(student, teacher).item() == pytest.approx(float(total), rel=1e-12)


def test_float32_near_the_teacher_has_the_value_of_float64():
    teacher = drawn(64, 128, seed=1).relu().float()
    student = teacher + 1e-3 * drawn(64, 128, seed=2).float()
    exact = pkt_loss(student.double(), teacher.double()).item()
    assert pkt_loss(student, teacher).item() == pytest.approx(exact, rel=1e-3)
    assert exact < 1e-9  # below the rounding of a ratio in float32
