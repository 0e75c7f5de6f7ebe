"""The flow between layers: the Gram matrix of the maps of two consecutive layers.

FSP: Yim et al. 2017, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
Learning", CVPR.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdpipe.stages.config import section
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.features.fitnet import InitialLoss
from kdpipe.stages.losses.inputs import DatasetInfo, LossInputs, Shapes, TeacherShapes
from kdpipe.stages.losses.shapes import shape_mismatch_error
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.targets.feature_spec import FeatureSpec
from kdpipe.stages.targets.statistics import pool_to


@section
class FSP(InitialLoss):
    """Mean squared difference of the Gram matrices between consecutive layers, before the student's own training.

    The layers of student and teacher have the same numbers of channels; the larger of two consecutive maps is
    average-pooled to the smaller. All are trained together. Defaults are those of RepDistiller.

    Attributes:
        layers: two or more pairs of (student layer, teacher layer), from shallow to deep.
    """

    paper: ClassVar[str] = "Yim et al. 2017, doi 10.1109/CVPR.2017.754"

    loss: Literal["fsp"] = "fsp"

    def build(self, student: Shapes, teacher: TeacherShapes, dataset: DatasetInfo) -> nn.Module:
        if len(self.layers) < 2:
            raise RecipeError("fsp compares matrices between two layers: give two or more pairs of layers.")
        features = self.required_features(student)
        for pair, feature in zip(self.layers, features, strict=True):
            own, other = student[pair[0]], teacher[feature]
            if not len(own) == len(other) == 3 or own[0] != other[0]:
                expected = "layers with maps of the same number of channels, or another loss, such as nst or at"
                raise shape_mismatch_error(self.loss, pair, own, other, expected)
        return FSPModule(self.student_layers(), features)


class FSPModule(nn.Module):
    """The loss of each sample, [B]."""

    def __init__(self, layers: Sequence[str], features: Sequence[FeatureSpec]) -> None:
        super().__init__()
        self.layers, self.features = tuple(layers), tuple(features)

    def forward(self, inputs: LossInputs) -> Tensor:
        student = [inputs.student.features[layer] for layer in self.layers]
        return fsp_loss(student, [inputs.teacher.features[feature] for feature in self.features])


def fsp_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Compute the mean squared difference of `flow` between consecutive layers, summed over them, of each sample, [B].

    Maps of each layer are [B, C, H, W], of student and teacher with the same C. The result is float32 or wider.

    Example:
        >>> maps = [torch.ones(1, 2, 4, 4), torch.ones(1, 3, 2, 2)]
        >>> fsp_loss(maps, [3 * one for one in maps])
        tensor([64.])
    """
    parts = [
        (flow(*own) - flow(*other)).square().flatten(1).mean(1)
        for own, other in zip(pairwise(student), pairwise(teacher), strict=True)
    ]
    return torch.stack(parts).sum(0)


def flow(first: Tensor, second: Tensor) -> Tensor:
    """Compute the products of all channels of two layers' maps, averaged over the positions: [B, C2, C1]."""
    first, second = to_float32(first), to_float32(second)
    size = min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3])
    first, second = (pool_to(maps, size).flatten(2) for maps in (first, second))
    return second @ first.mT / first.shape[2]
