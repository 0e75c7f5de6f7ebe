"""Gradient-based attention transfer: the student is to look where the teacher looks, at the pixels themselves.

Zagoruyko and Komodakis 2017 (arXiv 1612.03928), section 3.2. The loss depends on the student's gradient by the input,
so that its own gradient is a second derivative, which makes each step dearer.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from stages.config import section
from stages.forms import INPUT, INPUT_GRADIENT, Wanted, input_attention
from stages.losses.at import Form, attention_distance
from stages.losses.entry import Entry
from stages.losses.said import Facts, Said, Shapes, TeacherShapes
from stages.schedules import Amount

MAP = Wanted(INPUT, INPUT_GRADIENT)


@section
class ATGradientConfig(Entry):
    """weight times the distance between the attention maps of student's and teacher's gradients by the pixels.

    The gradient is that of each one's cross entropy with the label; its attention map is the mean over colours of the
    squares, scaled to length 1. variant: as for `at`.
    """

    paper: ClassVar[str] = "Zagoruyko & Komodakis 2017, arXiv 1612.03928"
    input_gradient: ClassVar[bool] = True

    loss: Literal["at_gradient"]
    weight: Amount = 1000.0
    variant: Form = "code"

    def wants(self, student: Shapes) -> tuple[Wanted, ...]:
        return (MAP,)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        return ATGradient(self)


class ATGradient(nn.Module):
    """The distance of each sample's attention maps, [B], from `Said.input_gradient`, which is part of the graph."""

    def __init__(self, config: ATGradientConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, said: Said) -> Tensor:
        if said.input_gradient is None:
            raise ValueError("at_gradient needs the gradient of the student's cross entropy by the pixels")
        return attention_distance(input_attention(said.input_gradient), said.teacher.features[MAP], self.config.variant)


def at_gradient_loss(student: Tensor, teacher: Tensor, form: Form = "code") -> Tensor:
    """The loss for the gradients by the pixels, [B, C, H, W] twice; a scalar in float32 or wider."""
    return attention_distance(input_attention(student), input_attention(teacher), form).mean()
