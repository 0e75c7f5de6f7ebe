"""Hard distillation: the class that the teacher predicts, as a label.

Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention", ICML
(arXiv 2012.12877), section 4.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.data.tasks import CLASSIFICATION, Task
from kdpipe.stages.losses.base import LogitLoss
from kdpipe.stages.losses.inputs import LossInputs
from kdpipe.stages.losses.schedules import Scheduled, Temperature
from kdpipe.stages.numerics import to_float32


@section
class HardDistillation(LogitLoss):
    """Cross entropy with the class that the teacher predicts.

    The default weight is the paper's, half of the loss; the other half is `student.hard_label_weight = 0.5`.
    """

    paper: ClassVar[str] = "Touvron et al. 2021, arXiv 2012.12877"
    min_classes: ClassVar[int] = 2
    tasks: ClassVar[tuple[Task, ...]] = (CLASSIFICATION,)

    loss: Literal["hard_distillation"] = "hard_distillation"
    weight: Scheduled = 0.5

    def temperatures(self) -> tuple[Temperature, ...]:
        return (1.0,)

    def compute(self, inputs: LossInputs) -> Tensor:
        return hard_distillation_loss(inputs.student.logits, inputs.teacher.logits_at(1.0))


def hard_distillation_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute -log p_s^y of each sample, [B], where y is the class of the teacher's largest logit.

    Both logits are [B, num_classes]. The result is float32 or wider.

    Example:
        >>> hard_distillation_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([2.1269])
    """
    return F.cross_entropy(to_float32(student_logits), teacher_logits.argmax(1), reduction="none")
