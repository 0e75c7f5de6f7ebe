"""Hints match the reference code, and adapters fit the teacher's shape."""

import pytest
import torch
from support.loss_inputs import STUDENT_HINTS, TEACHER_HINTS

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.features.hint import adapter, hint_loss


def test_hint_matches_the_reference_code():
    hint = hint_loss(STUDENT_HINTS, TEACHER_HINTS).mean()
    assert hint.item() == pytest.approx(1.954606313, rel=1e-9)


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
def test_error_has_both_shapes(student, teacher):
    with pytest.raises(RecipeError, match=str(list(student)).replace("[", r"\[") + ".*" + str(list(teacher))[1:-1]):
        adapter(student, teacher)
