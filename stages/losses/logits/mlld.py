"""Multi-level logit distillation: samples, relations of classes and relations of samples, at several temperatures.

MLLD: Jin, Wang, Lin 2023, "Multi-Level Logit Distillation", CVPR.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.data.tasks import CLASSIFICATION, Task
from kdpipe.stages.losses.base import LogitLoss
from kdpipe.stages.losses.inputs import LossInputs
from kdpipe.stages.losses.logits.kd import kd_loss
from kdpipe.stages.losses.schedules import Temperature, value_at
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.runtime.collectives import all_gather_with_grad

MAX_RELATIONS = 2**22
"""The largest number of elements of a matrix [num_classes, num_classes] that is computed: 16 MiB in float32."""


@section
class MLLD(LogitLoss):
    """KD + squared errors of the Gram matrices over classes and over samples, summed over several temperatures.

    The Gram matrices are those of the batch of all processes. The authors' code also multiplies by masks of the less
    confident half of samples and classes, after the mean, which makes them one factor of about 0.5 for the whole batch:
    left out here. Its second, strongly augmented view is a kind of view of the recipe: see `recipes/mlld.toml`. The
    temperatures are those of the authors' code.

    Attributes:
        temperature_list: the temperatures.
    """

    paper: ClassVar[str] = "Jin et al. 2023, CVPR"
    per_sample: ClassVar[bool] = False
    min_classes: ClassVar[int] = 2
    tasks: ClassVar[tuple[Task, ...]] = (CLASSIFICATION,)

    loss: Literal["mlld"] = "mlld"
    temperature_list: Annotated[tuple[Temperature, ...], Field(min_length=1)] = (2.0, 3.0, 4.0, 5.0, 6.0)

    def temperatures(self) -> tuple[Temperature, ...]:
        return self.temperature_list

    def compute(self, inputs: LossInputs) -> Tensor:
        temperatures = [value_at(temperature, inputs.progress) for temperature in self.temperature_list]
        logits, teacher = inputs.student.logits, inputs.teacher
        return torch.stack([mlld_loss(logits, teacher.logits_at(value), value) for value in temperatures]).sum()


def mlld_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Compute `kd_loss` + `class_relation` + `batch_relation` of softmax(logits / T), at one temperature.

    Both logits are [B, num_classes]. The result is a scalar in float32 or wider.

    Example:
        >>> mlld_loss(torch.eye(3), torch.eye(3).flip(0), temperature=2.0)
        tensor(0.2371)
    """
    student = F.softmax(to_float32(student_logits) / temperature, 1)
    teacher = F.softmax(to_float32(teacher_logits).to(student.dtype) / temperature, 1)
    student, teacher = all_gather_with_grad(student), all_gather_with_grad(teacher)
    instance = all_gather_with_grad(kd_loss(student_logits, teacher_logits, temperature)).mean()
    return instance + class_relation(student, teacher) + batch_relation(student, teacher)


def class_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute |P_s^T P_s - P_t^T P_t|^2 / num_classes of probabilities P [B, num_classes], a scalar.

    With many classes it is |P_s P_s^T|^2 + |P_t P_t^T|^2 - 2 |P_s P_t^T|^2, of matrices [B, B], in float64.
    """
    num_classes = student.shape[1]
    if num_classes**2 <= MAX_RELATIONS:
        return (student.t() @ student - teacher.t() @ teacher).square().sum() / num_classes
    s, t = student.double(), teacher.double()
    squares = [(x @ y.t()).square().sum() for x, y in ((s, s), (t, t), (s, t))]
    return ((squares[0] + squares[1] - 2 * squares[2]) / num_classes).to(student.dtype)


def batch_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute |P_s P_s^T - P_t P_t^T|^2 / B of probabilities P [B, num_classes], a scalar."""
    return (student @ student.t() - teacher @ teacher.t()).square().sum() / student.shape[0]
