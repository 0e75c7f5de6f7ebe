"""SP matches the reference code and a loop implementation."""

import pytest
import torch
from support.loss_inputs import STUDENT_MAPS, TEACHER_MAPS, drawn

from kdpipe.stages.losses.relations.sp import sp_loss


def test_sp_matches_the_reference_code():
    assert sp_loss(STUDENT_MAPS, TEACHER_MAPS).item() == pytest.approx(0.0004444366941, rel=1e-9)


def test_sp_compares_normed_rows_of_products():
    student, teacher = drawn(3, 2, seed=1), drawn(3, 4, seed=2)
    total = 0.0
    for i in range(3):
        rows = [torch.stack([side[i] @ side[j] for j in range(3)]) for side in (student, teacher)]
        total += sum((rows[0] / rows[0].norm() - rows[1] / rows[1].norm()) ** 2) / 9
    assert sp_loss(student, teacher).item() == pytest.approx(float(total), rel=1e-12)
