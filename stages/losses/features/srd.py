"""Feature distillation with a linear projector, batch norms and a soft maximum of the differences.

SRD: Miles and Mikolajczyk 2024, "Understanding the Role of the Projector in Knowledge Distillation", AAAI
(arXiv 2303.11098), formerly "A Simple Recipe".
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import PooledLoss
from kdpipe.stages.losses.relations.relation import Embedding
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.losses.shapes import Pair
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.runtime.collectives import all_gather_with_grad
from kdpipe.stages.targets.feature_spec import FeatureSpec, Shape

VARIANCE_EPS, SUM_EPS = 1e-4, 1e-5
"""Of the batch norms, as in the authors' code for ImageNet, and of the logarithm, as in that for DeiT."""


@section
class SRD(PooledLoss):
    """log of the sum over samples and dimensions of |difference|^4 of the normalized vectors.

    The student's go through a linear layer first; both are normalized over the batch of all processes to mean 0 and
    variance 1 in each dimension. The default weight is that of the authors' code.
    """

    paper: ClassVar[str] = "Miles & Mikolajczyk 2024, arXiv 2303.11098"
    per_sample: ClassVar[bool] = False

    loss: Literal["srd"] = "srd"
    weight: Scheduled = 2.0

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        return SRDModule(student, teacher)


class SRDModule(nn.Module):
    """The loss of a batch, a scalar, with the projector of one pair of layers, which trains with the student."""

    def __init__(self, student: Shape, teacher: Shape) -> None:
        super().__init__()
        self.projector = Embedding(student, teacher[0])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return srd_loss(all_gather_with_grad(self.projector(student)), all_gather_with_grad(teacher))


def srd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute log(sum of |s - t|^4 + eps), a scalar in float32 or wider, of vectors [B, D] normalized over the batch.

    Example:
        >>> srd_loss(torch.eye(2), torch.eye(2).flip(0))
        tensor(4.1581)
    """
    student = to_float32(student)
    difference = _normalized(student) - _normalized(teacher.to(student.dtype))
    return (difference.pow(4).sum() + SUM_EPS).log()


def _normalized(rows: Tensor) -> Tensor:
    centered = rows - rows.mean(0)
    return centered * (centered.square().mean(0) + VARIANCE_EPS).rsqrt()
