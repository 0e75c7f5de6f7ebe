"""Cosine distance between the embeddings of student and teacher, for teachers without a classifier.

AM-RADIO: Ranzinger et al. 2024, "AM-RADIO: Agglomerative Vision Foundation Model", CVPR (arXiv 2312.06709), which so
matches the summary embeddings of CLIP, DINOv2 and others.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import PooledLoss
from kdpipe.stages.losses.relations.relation import Embedding
from kdpipe.stages.losses.shapes import Pair
from kdpipe.stages.numerics import normalize_rows, to_float32
from kdpipe.stages.targets.feature_spec import FeatureSpec, Shape


@section
class Cosine(PooledLoss):
    """One minus the cosine of the student's embedding, through a linear layer, and the teacher's."""

    paper: ClassVar[str] = "Ranzinger et al. 2024, arXiv 2312.06709"

    loss: Literal["cosine"] = "cosine"

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        return CosineModule(student, teacher)


class CosineModule(nn.Module):
    """The cosine distance of each sample, [B], with the linear layer of one pair, which trains with the student."""

    def __init__(self, student: Shape, teacher: Shape) -> None:
        super().__init__()
        self.adapter = Embedding(student, teacher[0])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cosine_loss(self.adapter(student), teacher)


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 1 - cos(student, teacher) of each sample, [B], in float32 or wider, from vectors [B, D].

    Example:
        >>> cosine_loss(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        tensor([0., 1.])
    """
    student = to_float32(student)
    return 1 - (normalize_rows(student) * normalize_rows(teacher.to(student.dtype))).sum(1)
