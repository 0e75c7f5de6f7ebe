"""Attention transfer, with activation-based and with gradient-based maps.

AT: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural
Networks via Attention Transfer", ICLR (arXiv 1612.03928), sections 3.1 and 3.2. The gradient of the gradient-based loss
is a second derivative, which makes each step more expensive.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import Loss, MapLoss
from kdpipe.stages.losses.inputs import LossInputs, Shapes
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.losses.shapes import Size, map_size
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.targets.feature_spec import ATTENTION, INPUT, INPUT_GRADIENT, FeatureSpec, Shape
from kdpipe.stages.targets.statistics import attention, input_attention

ATVariant = Literal["code", "paper"]

GRADIENT = FeatureSpec(INPUT, INPUT_GRADIENT)


@section
class AT(MapLoss):
    """Distance between the attention maps of student and teacher, summed over pairs of layers.

    An attention map is the mean over channels of the squared activations, L2-normalized; the larger of two maps is
    average-pooled first. The default weight is that of RepDistiller.

    Attributes:
        variant: "code" is the mean over pixels of the squared differences, as in RepDistiller; "paper" is the L2 norm
            of the difference (equation 2), which is larger by orders of magnitude and needs a smaller weight.
    """

    paper: ClassVar[str] = "Zagoruyko & Komodakis 2017, arXiv 1612.03928"
    requires: ClassVar[str] = "attention map [H, W] of each layer, at the student's size at most"

    loss: Literal["at"] = "at"
    weight: Scheduled = 1000.0
    variant: ATVariant = "code"

    def teacher_feature(self, layer: str, student: Shape) -> FeatureSpec:
        return FeatureSpec(layer, ATTENTION, map_size(student))

    def common_size(self, student: Shape, teacher: Shape, feature: FeatureSpec) -> Size | None:
        return (teacher[0], teacher[1]) if len(teacher) == 2 else None

    def distance(self, student: Tensor, teacher: Tensor, feature: FeatureSpec) -> Tensor:
        return at_loss(attention(student), teacher, self.variant)


@section
class ATGradient(Loss):
    """Distance between the attention maps of the input gradients of student and teacher.

    The gradient is that of the network's cross entropy with the label; its attention map is the mean over colors of the
    squares, L2-normalized. The default weight is that of `at`.

    Attributes:
        variant: as for `at`.
    """

    paper: ClassVar[str] = "Zagoruyko & Komodakis 2017, arXiv 1612.03928"
    requires: ClassVar[str] = "input gradient's attention map [H, W]"
    input_gradient: ClassVar[bool] = True

    loss: Literal["at_gradient"] = "at_gradient"
    weight: Scheduled = 1000.0
    variant: ATVariant = "code"

    def required_features(self, student: Shapes) -> tuple[FeatureSpec, ...]:
        return (GRADIENT,)

    def compute(self, inputs: LossInputs) -> Tensor:
        if inputs.input_gradient is None:
            raise ValueError("at_gradient needs the input gradient of the student's cross entropy")
        teacher = inputs.teacher.features[GRADIENT]
        return at_loss(input_attention(inputs.input_gradient), teacher, self.variant)


def at_loss(student: Tensor, teacher: Tensor, variant: ATVariant = "code") -> Tensor:
    """Compute the distance of L2-normalized attention maps of each sample, [B], in float32 or wider.

    Student and teacher are attention maps [B, H, W], or the layers' maps [B, C, H, W], of equal height and width.

    Example:
        >>> at_loss(torch.eye(4)[None, None], torch.eye(4).flip(0)[None, None])
        tensor([0.1250])
    """
    student, teacher = (attention(to_float32(maps)) if maps.dim() == 4 else maps for maps in (student, teacher))
    difference = (student - teacher.to(student.dtype)).flatten(1)
    if variant == "paper":  # torch's gradient of the norm is 0 at 0
        norms: Tensor = torch.linalg.vector_norm(difference, dim=1)
        return norms
    return difference.square().mean(1)
