"""Softmax regression: the student's vector should be the teacher's, and be read by the teacher's classifier alike.

SRRL: Yang et al. 2021, "Knowledge Distillation via Softmax Regression Representation Learning", ICLR
(openreview ZzwDy_wiWv), equations 2 and 5, with the squared error of logits as in the authors' code.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import PathStr, max_value, section
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.inputs import DatasetInfo, LossInputs, Shapes, TeacherShapes
from kdpipe.stages.losses.shapes import as_map_shape, as_maps, map_size, token_advice
from kdpipe.stages.models.tokens import PRE_LOGITS
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.targets.feature_spec import POOLED, TEACHER_HEAD, FeatureSpec

TEACHER_VECTOR = FeatureSpec(PRE_LOGITS, POOLED)


@section
class SRRL(Loss):
    """Squared error of the vector before the classifier, and of the teacher's logits for it, both means.

    The student's layer goes through a 1x1 convolution with batch norm and ReLU, is averaged over its positions, and
    then through the teacher's last linear layer, which is frozen. The paper takes the student's last map.

    Attributes:
        layer: the student's layer, of which maps are averaged; by default the input of its classifier.
        logit_weight: weight of the squared error of the logits against that of the vectors.
    """

    paper: ClassVar[str] = "Yang et al. 2021, ICLR"
    requires: ClassVar[str] = "input of the last linear layer [D], and that layer once"
    needs_head: ClassVar[bool] = True

    loss: Literal["srrl"] = "srrl"
    layer: PathStr = PRE_LOGITS
    logit_weight: Annotated[float, Field(ge=0), max_value(1e6)] = 1.0

    def student_layers(self) -> tuple[str, ...]:
        return (self.layer,)

    def required_features(self, student: Shapes) -> tuple[FeatureSpec, ...]:
        return TEACHER_VECTOR, TEACHER_HEAD

    def build(self, student: Shapes, teacher: TeacherShapes, dataset: DatasetInfo) -> nn.Module:
        shape, vector, head = as_map_shape(student[self.layer]), teacher[TEACHER_VECTOR], teacher[TEACHER_HEAD]
        if map_size(shape) is None:
            raise RecipeError(
                f"srrl needs a map or a vector, and the student's {self.layer} has shape {list(shape)}: choose its "
                f"last map{token_advice(shape)}."
            )
        if vector != (head[1] - 1,):
            raise RecipeError(
                f"srrl: the teacher's head takes {head[1] - 1} numbers, and its {PRE_LOGITS} has shape {list(vector)}: "
                "both must be of one teacher."
            )
        return SRRLModule(self.layer, shape[0], vector[0], self.logit_weight)


class SRRLModule(nn.Module):
    """The loss of each sample, [B], with the adapter of the student's layer, which trains with the student."""

    def __init__(self, layer: str, student: int, teacher: int, logit_weight: float) -> None:
        super().__init__()
        convolution = nn.Conv2d(student, teacher, 1, bias=False)
        nn.init.normal_(convolution.weight, 0, math.sqrt(2 / teacher))
        self.adapter = nn.Sequential(convolution, nn.BatchNorm2d(teacher), nn.ReLU())
        self.layer = layer
        self.logit_weight = logit_weight

    def forward(self, inputs: LossInputs) -> Tensor:
        vectors = self.adapter(as_maps(inputs.student.features[self.layer])).mean((2, 3))
        features = inputs.teacher.features
        return srrl_loss(vectors, features[TEACHER_VECTOR], features[TEACHER_HEAD], logit_weight=self.logit_weight)


def srrl_loss(student: Tensor, teacher: Tensor, head: Tensor, *, logit_weight: float = 1.0) -> Tensor:
    """Compute the mean squared error of vectors plus logit_weight times that of their logits, of each sample, [B].

    Vectors are [B, D]; `head` [C, D + 1] has the weights of the teacher's last layer, and in its last column the
    biases, which cancel. The result is float32 or wider.

    Example:
        >>> import torch
        >>> head = torch.tensor([[1.0, 0.0, 9.0], [0.0, 3.0, 9.0]])
        >>> srrl_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]), head)
        tensor([21.])
    """
    student = to_float32(student)
    difference = student - teacher.to(student.dtype)
    logits = F.linear(difference, head[:, :-1].to(student.dtype))
    return difference.square().mean(1) + logit_weight * logits.square().mean(1)
