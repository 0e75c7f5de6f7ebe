"""Hard distillation is the cross entropy with the teacher's class."""

import torch
from support.loss_inputs import DATASET, STUDENT_LOGITS, TEACHER_LOGITS, make_inputs

from kdpipe.stages.losses.logits.hard_distillation import HardDistillation, hard_distillation_loss


def test_value_is_the_cross_entropy_with_the_predicted_class():
    classes = TEACHER_LOGITS.argmax(1)
    expected = torch.stack([-row.log_softmax(0)[y] for row, y in zip(STUDENT_LOGITS, classes, strict=True)])
    torch.testing.assert_close(hard_distillation_loss(STUDENT_LOGITS, TEACHER_LOGITS), expected)
    torch.testing.assert_close(HardDistillation().build({}, {}, DATASET)(make_inputs()), expected)


def test_half_precision_is_computed_in_float32():
    ends = torch.tensor([[300.0, -300.0, 0.0]], dtype=torch.float16)
    assert hard_distillation_loss(ends, ends.flip(1)).tolist() == [300.0]
