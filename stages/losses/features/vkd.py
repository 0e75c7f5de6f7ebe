"""Feature distillation through an orthogonal projection, which keeps the similarities of the student's features.

VkD: Miles, Elezi and Deng 2024, "VkD: Improving Knowledge Distillation using Orthogonal Projections", CVPR
(arXiv 2403.06213).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import PooledLoss
from kdpipe.stages.losses.relations.relation import Embedding
from kdpipe.stages.losses.shapes import Pair
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.targets.feature_spec import FeatureSpec, Shape


@section
class VkD(PooledLoss):
    """Smooth L1 distance of the student's vector, orthogonally projected, and the teacher's, normalized by LayerNorm.

    The default weight is that of the authors' code.
    """

    paper: ClassVar[str] = "Miles et al. 2024, arXiv 2403.06213"

    loss: Literal["vkd"] = "vkd"

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        return VkDModule(student, teacher)


class VkDModule(nn.Module):
    """The loss of each sample, [B], with the orthogonal projection of one pair, which trains with the student."""

    def __init__(self, student: Shape, teacher: Shape) -> None:
        super().__init__()
        self.projector = Embedding(student, teacher[0])
        # Householder reflections do not wait for a GPU, as a matrix exponential does; no constant buffer is kept.
        orthogonal(self.projector.linear, orthogonal_map="householder", use_trivialization=False)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return vkd_loss(self.projector(student), teacher)


def vkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean over D of smooth L1(student - LayerNorm(teacher)) of each sample, [B], from vectors [B, D].

    The result is float32 or wider.

    Example:
        >>> vkd_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 5.0]]))
        tensor([0.5000])
    """
    student = to_float32(student)
    target = F.layer_norm(teacher.to(student.dtype), teacher.shape[1:])
    return F.smooth_l1_loss(student, target, reduction="none").mean(1)
