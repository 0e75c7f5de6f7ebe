"""Wasserstein distance of predictions: how far probability must be moved between classes, by their similarity.

WKD-L: Lv, Yang and Li 2024, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation",
NeurIPS (arXiv 2412.08139), section 3.1, with the label apart as in the authors' code.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import max_value, section
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import SoftLogitLoss
from kdpipe.stages.losses.inputs import DatasetInfo, LossInputs, Shapes, TeacherShapes
from kdpipe.stages.losses.logits.nkd import target_loss
from kdpipe.stages.losses.schedules import Scheduled, Temperature, value_at
from kdpipe.stages.numerics import normalize_rows, to_float32
from kdpipe.stages.targets.feature_spec import TEACHER_HEAD, FeatureSpec

EPS = 1e-8
"""Added to costs and divisors, as in the authors' code."""


@section
class WKDL(SoftLogitLoss):
    """Cross entropy of the label plus gamma times the Wasserstein distance among the other classes.

    The cost of moving probability between two classes is 1 - exp(-sharpen (1 - cosine)) of their rows in the teacher's
    last layer, the option "fc" of the authors' code; their published results have class features compared by CKA there.
    Defaults are those for a ResNet-8x4 on CIFAR-100, where gamma falls along a cosine from epoch 150 of 240:
    `gamma = { start = 600.0, end = 0.0, shape = "cosine", epochs = [150, 240] }`, with a hard-label weight of 1. On
    ImageNet gamma is 30 and T = 2.

    Attributes:
        gamma: weight of the distance among the other classes.
        sharpen: how much more similar classes count; 0 for the cost 1 - cosine.
        regularization: weight of the entropy in the distance.
        iterations: Sinkhorn iterations.
    """

    paper: ClassVar[str] = "Lv et al. 2024, arXiv 2412.08139"
    requires: ClassVar[str] = "logits, and the last linear layer once"
    one_label: ClassVar[bool] = True
    two_classes: ClassVar[str] = "the distance among the other classes (gamma) is 0"
    needs_head: ClassVar[bool] = True
    compares_classes: ClassVar[bool] = True

    loss: Literal["wkd_l"] = "wkd_l"
    temperature: Temperature = 8.0
    gamma: Scheduled = 600.0
    sharpen: Annotated[float, Field(ge=0), max_value(1e3)] = 1.0
    regularization: Annotated[float, Field(ge=0.01), max_value(1e3)] = 0.05
    iterations: Annotated[int, Field(ge=1), max_value(1000)] = 10

    def temperatures(self) -> tuple[Temperature, ...]:
        return (1.0, self.temperature)

    def required_features(self, student: Shapes) -> tuple[FeatureSpec, ...]:
        return (TEACHER_HEAD,)

    def build(self, student: Shapes, teacher: TeacherShapes, dataset: DatasetInfo) -> nn.Module:
        if (num_classes := teacher[TEACHER_HEAD][0]) != dataset.num_classes:
            raise RecipeError(
                f"wkd_l compares classes by the teacher's last layer, which has {num_classes}, and the student has "
                f"{dataset.num_classes}: use a teacher of the same classes."
            )
        return super().build(student, teacher, dataset)

    def compute(self, inputs: LossInputs) -> Tensor:
        temperature, gamma = value_at(self.temperature, inputs.progress), value_at(self.gamma, inputs.progress)
        logits, teacher, labels = inputs.student.logits, inputs.teacher, inputs.labels
        cost = class_costs(teacher.features[TEACHER_HEAD], sharpen=self.sharpen)
        distance = wasserstein_distance(
            _others(logits, labels, temperature),
            _others(teacher.logits_at(temperature), labels, temperature),
            cost,
            regularization=self.regularization,
            iterations=self.iterations,
        )
        return target_loss(logits, teacher.logits_at(1.0), labels) + gamma * distance


def wkd_l_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    cost: Tensor,
    temperature: float = 8.0,
    *,
    gamma: float = 600.0,
    regularization: float = 0.05,
    iterations: int = 10,
) -> Tensor:
    """Compute -p_t^y log p_s^y + gamma W(q_s, q_t) of each sample, [B].

    y is the label, p = softmax(logits), q = softmax(logits / T) over the classes other than y, W the distance of
    `wasserstein_distance`. Both logits are [B, num_classes], labels int64 [B], `cost` [num_classes, num_classes] as
    from `class_costs`. The result is float32 or wider.

    Example:
        >>> zeros, cost = torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.5], [0.5, 0.5, 0.0]])
        >>> wkd_l_loss(zeros, torch.tensor([[0.0, 0.0, 80.0]]), torch.tensor([0]), cost, gamma=1.0)
        tensor([0.2500])
    """
    student, teacher = (_others(logits, labels, temperature) for logits in (student_logits, teacher_logits))
    distance = wasserstein_distance(student, teacher, cost, regularization=regularization, iterations=iterations)
    return target_loss(student_logits, teacher_logits, labels) + gamma * distance


def class_costs(head: Tensor, *, sharpen: float = 1.0) -> Tensor:
    """Compute the cost of moving probability between classes, [C, C], from a last layer [C, D + 1] with its biases.

    It is 1 - exp(-sharpen (1 - cosine)) of the weights of both classes, without the biases, or 1 - cosine if `sharpen`
    is 0; at least 1e-8. The result is float32 or wider.

    Example:
        >>> class_costs(torch.tensor([[3.0, 0.0, 9.0], [0.0, 1.0, 9.0]]), sharpen=0)
        tensor([[1.0000e-08, 1.0000e+00],
                [1.0000e+00, 1.0000e-08]])
    """
    rows = normalize_rows(to_float32(head[:, :-1]))
    distance = 1 - rows @ rows.T
    return (1 - torch.exp(-sharpen * distance) if sharpen else distance).relu() + EPS


def wasserstein_distance(
    student: Tensor, teacher: Tensor, cost: Tensor, *, regularization: float = 0.05, iterations: int = 10
) -> Tensor:
    """Compute the entropy-regularized Wasserstein distance of probabilities [B, C], of each sample, [B].

    By Sinkhorn's iterations (Cuturi 2013, arXiv 1306.0895) with the cost [C, C]. Classes without probability on both
    sides take no part.
    """
    cost = cost.to(student.dtype)
    kernel = torch.exp(-cost / regularization)
    takes_part = ((student.detach() > 0) | (teacher > 0)).to(student.dtype)
    source = takes_part / takes_part.sum(1, keepdim=True)
    target = source
    for _ in range(iterations):
        target = teacher / (source @ kernel + EPS)
        source = student / (target @ kernel.T + EPS)
    return (source * (target @ (kernel * cost).T)).sum(1)


def _others(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Compute softmax(logits / T) over the classes but the label, [B, C], 0 for the label; in float32 or wider."""
    soft = (to_float32(logits) / temperature).scatter(1, labels[:, None], -torch.inf)
    return soft.softmax(1)
