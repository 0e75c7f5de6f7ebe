"""Projector ensembles: the student's embedding, through the mean of several projectors, in the teacher's direction.

PEFD: Chen et al. 2022, "Improved Feature Distillation via Projector Ensemble", NeurIPS (arXiv 2210.15274).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import PooledLoss
from kdpipe.stages.losses.features.cosine import cosine_loss
from kdpipe.stages.losses.relations.relation import Embedding
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.losses.shapes import Pair
from kdpipe.stages.targets.feature_spec import FeatureSpec, Shape


@section
class PEFD(PooledLoss):
    """One minus the cosine of the teacher's vector and the mean of several projections of the student's.

    Each projection is a linear layer, started from other random weights, and a ReLU. Defaults are those of the authors'
    code.

    Attributes:
        num_projectors: the number of projections.
    """

    paper: ClassVar[str] = "Chen et al. 2022, arXiv 2210.15274"

    loss: Literal["pefd"] = "pefd"
    weight: Scheduled = 25.0
    num_projectors: Annotated[int, Field(ge=1, le=100)] = 3

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        return ProjectorEnsemble([Embedding(student, teacher[0]) for _ in range(self.num_projectors)])


class ProjectorEnsemble(nn.Module):
    """The loss of each sample, [B], with the projectors of one pair of layers, which train with the student."""

    def __init__(self, projectors: list[nn.Module]) -> None:
        super().__init__()
        self.projectors = nn.ModuleList(projectors)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cosine_loss(torch.stack([projector(student).relu() for projector in self.projectors]).mean(0), teacher)
