"""WSLD against its formula, sample by sample, and the weights it gives."""

import math

import pytest
import torch
from support.loss_inputs import DATASET, LABELS, STUDENT_LOGITS, TEACHER_LOGITS, make_inputs

from kdpipe.stages.losses.logits.wsld import WSLD, sample_weights, wsld_loss


def formula(student, teacher, label, temperature):
    own, target = -student.log_softmax(0)[label].item(), -teacher.log_softmax(0)[label].item()
    soft = (teacher / temperature).softmax(0) @ (student / temperature).log_softmax(0)
    return -(1 - math.exp(-own / (target + 1e-7))) * temperature**2 * soft.item()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_values_are_those_of_the_formula(temperature):
    rows = zip(STUDENT_LOGITS, TEACHER_LOGITS, LABELS.tolist(), strict=True)
    expected = torch.tensor([formula(*row, temperature) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(wsld_loss(STUDENT_LOGITS, TEACHER_LOGITS, LABELS, temperature), expected)
    torch.testing.assert_close(WSLD(temperature=temperature).build({}, {}, DATASET)(make_inputs()), expected)


def test_a_student_better_than_the_teacher_learns_little():
    logits = torch.tensor([[8.0, 0.0], [0.0, 8.0]])
    better, worse = sample_weights(logits, torch.tensor([[1.0, 0.0]] * 2), torch.tensor([0, 0])).tolist()
    assert better < 0.01 and worse > 0.99


def test_weights_have_no_gradient():
    logits = STUDENT_LOGITS.clone().requires_grad_()
    wsld_loss(logits, TEACHER_LOGITS, LABELS, 2.0).sum().backward()
    weights = sample_weights(STUDENT_LOGITS, TEACHER_LOGITS, LABELS)
    difference = (STUDENT_LOGITS / 2).softmax(1) - (TEACHER_LOGITS / 2).softmax(1)
    torch.testing.assert_close(logits.grad, 2 * weights[:, None] * difference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_saturated_logits_match_float64(dtype, label):
    ends, labels = torch.tensor([[300.0, -300, 0, 150]], dtype=dtype), torch.tensor([label])
    wide = wsld_loss(ends.double(), ends.flip(1).double(), labels)
    assert wsld_loss(ends, ends.flip(1), labels).item() == pytest.approx(wide.item(), rel=1e-5, abs=1e-5)


def test_defaults_are_those_of_the_authors_code():
    assert (WSLD().weight, WSLD().temperature, WSLD(temperature=3.0).temperatures()) == (2.5, 2.0, (1.0, 3.0))
