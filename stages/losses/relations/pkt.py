"""Probabilistic knowledge transfer: match the probabilities that samples are neighbors.

PKT: Passalis and Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV
(arXiv 1803.10837).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.losses.relations.relation import RelationLoss
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.numerics import to_float32

EPS = 1e-7


@section
class PKT(RelationLoss):
    """KL divergence between the neighbor probabilities of the batch's samples, summed over pairs of layers.

    The default weight is that of RepDistiller.
    """

    paper: ClassVar[str] = "Passalis and Tefas 2018, arXiv 1803.10837"

    loss: Literal["pkt"] = "pkt"
    weight: Scheduled = 30000.0

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return pkt_loss(student, teacher)


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean over B^2 of p_t log((p_t + eps) / (p_s + eps)), with p from `neighbors`.

    As in RepDistiller a sample is one of its own neighbors. The logarithms are those of ratios close to 1, which the
    weight of 30,000 enlarges: computed in float64.

    Features are [B, D] and [B, D']. The result is a scalar in float32 or wider.

    Example:
        >>> pkt_loss(torch.eye(4), torch.ones(4, 8))
        tensor(0.0125)
    """
    student = to_float32(student)
    p_student, p_teacher = neighbors(student.double()), neighbors(teacher.double())
    return (p_teacher * ((p_teacher + EPS) / (p_student + EPS)).log()).mean().to(student.dtype)


def neighbors(vectors: Tensor) -> Tensor:
    """Compute (cosine + 1) / 2 of the batch's vectors, [B, D] to [B, B], each row divided by its sum.

    The cosine with a zero vector is 0, and its gradient is 0.
    """
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    units = (vectors / (norms + EPS)).masked_fill(norms == 0, 0.0)
    kernel = (units @ units.T + 1) / 2
    probabilities: Tensor = kernel / kernel.sum(1, keepdim=True)
    return probabilities
