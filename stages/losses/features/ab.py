"""Activation boundaries: on which side of zero each neuron is, before its activation.

AB: Heo et al. 2019, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", AAAI
(arXiv 1811.03233), equation 6.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import max_value, section
from kdpipe.stages.losses.base import PairedModule
from kdpipe.stages.losses.features.fitnet import InitialLoss
from kdpipe.stages.losses.features.hint import adapter
from kdpipe.stages.losses.inputs import DatasetInfo, LossInputs, Shapes, TeacherShapes
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.losses.shapes import Pair
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.targets.feature_spec import FeatureSpec, Shape


@section
class AB(InitialLoss):
    """Squared distance of the student's values from a margin beyond zero, where they are on the other side of it.

    All pairs are trained together before the student's own training, each with half of the weight of the next deeper
    one. Layers are those before a ReLU, such as batch norms; of the teacher those after it will do, as only signs
    count. Where shapes differ, the student's map goes through a convolution with batch norm. Defaults are those of
    RepDistiller, for sums over a map.

    Attributes:
        margin: the distance from zero that the student's values shall have.
    """

    paper: ClassVar[str] = "Heo et al. 2019, arXiv 1811.03233"
    requires: ClassVar[str] = "map [C, H, W] of each layer, of which signs count"

    loss: Literal["ab"] = "ab"
    weight: Scheduled = 0.003
    margin: Annotated[float, Field(ge=0), max_value(1e6)] = 1.0

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        return ABModule(student, teacher, self.margin)

    def build(self, student: Shapes, teacher: TeacherShapes, dataset: DatasetInfo) -> nn.Module:
        paired = super().build(student, teacher, dataset)
        assert isinstance(paired, PairedModule)
        return HalvedModule(paired)


class ABModule(nn.Module):
    """The loss of each sample, [B], with the adapter of one pair of layers, which trains with the student."""

    def __init__(self, student: Shape, teacher: Shape, margin: float) -> None:
        super().__init__()
        joined = nn.Identity() if student == teacher else adapter(student, teacher)
        self.adapter = joined[:-1] if isinstance(joined, nn.Sequential) else joined  # without its ReLU
        self.margin = margin

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return ab_loss(self.adapter(student), teacher, self.margin)


class HalvedModule(nn.Module):
    """The sum over pairs of layers, from shallow to deep, each at half of the weight of the next."""

    def __init__(self, paired: PairedModule) -> None:
        super().__init__()
        self.pairs, self.sources = paired.pairs, paired.sources

    def forward(self, inputs: LossInputs) -> Tensor:
        parts = [
            0.5 ** (len(self.sources) - 1 - number)
            * loss(inputs.student.features[layer], inputs.teacher.features[feature])
            for number, (loss, (layer, feature)) in enumerate(zip(self.pairs, self.sources, strict=True))
        ]
        return torch.stack(parts).sum(0)


def ab_loss(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """Compute the sum of (s + m)^2 where t <= 0 and s > -m, and (s - m)^2 where t > 0 and s <= m, of each sample, [B].

    Features are [B, ...] of one shape. The result is float32 or wider.

    Example:
        >>> ab_loss(torch.tensor([[0.5, -3.0, -2.0]]), torch.tensor([[-1.0, -1.0, 4.0]]))
        tensor([11.2500])
    """
    student = to_float32(student)
    distance = torch.where(teacher > 0, margin - student, margin + student).clamp(min=0)
    return distance.square().flatten(1).sum(1)
