"""Gradient-based attention transfer, on the input gradient of the cross entropy.

Zagoruyko and Komodakis 2017, "Paying More Attention to Attention", ICLR (arXiv 1612.03928), section 3.2. The gradient
of the loss is a second derivative, which makes each step more expensive.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import LossConfig
from kdpipe.stages.losses.features.at import Variant, attention_distance
from kdpipe.stages.losses.inputs import LossInputs, Shapes
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.targets.feature_spec import INPUT, INPUT_GRADIENT, FeatureSpec
from kdpipe.stages.targets.statistics import input_attention

MAP = FeatureSpec(INPUT, INPUT_GRADIENT)


@section
class ATGradientConfig(LossConfig):
    """Distance between the attention maps of the input gradients of student and teacher.

    The gradient is that of the network's cross entropy with the label; its attention map is the mean over colors of the
    squares, L2-normalized. The default weight is that of `at`.

    Attributes:
        variant: as for `at`.
    """

    paper: ClassVar[str] = "Zagoruyko & Komodakis 2017, arXiv 1612.03928"
    input_gradient: ClassVar[bool] = True

    loss: Literal["at_gradient"]
    weight: Scheduled = 1000.0
    variant: Variant = "code"

    def required_features(self, student: Shapes) -> tuple[FeatureSpec, ...]:
        return (MAP,)

    def compute(self, inputs: LossInputs) -> Tensor:
        if inputs.input_gradient is None:
            raise ValueError("at_gradient needs the input gradient of the student's cross entropy")
        return attention_distance(input_attention(inputs.input_gradient), inputs.teacher.features[MAP], self.variant)


def at_gradient_loss(student: Tensor, teacher: Tensor, form: Variant = "code") -> Tensor:
    """Compute the loss of two input gradients [B, C, H, W], a scalar in float32 or wider."""
    return attention_distance(input_attention(student), input_attention(teacher), form).mean()
