"""Regression of the teacher's raw logits.

Ba and Caruana 2014, "Do Deep Nets Really Need to be Deep?", NeurIPS (arXiv 1312.6184); Kim et al. 2021, "Comparing
Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation", IJCAI (arXiv 2105.08919).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.losses.base import LogitLossConfig
from kdpipe.stages.losses.features.hint import hint_per_sample
from kdpipe.stages.losses.inputs import LossInputs


@section
class LogitMSEConfig(LogitLossConfig):
    """Mean squared error between the raw logits of student and teacher: the limit of KD at large T.

    The mean is over samples and classes; Ba and Caruana use half the sum over the classes, larger by num_classes / 2.
    """

    paper: ClassVar[str] = "Ba and Caruana 2014, arXiv 1312.6184; Kim et al. 2021, arXiv 2105.08919"
    whole_logits: ClassVar[bool] = True

    loss: Literal["logit_mse"]

    def compute(self, inputs: LossInputs) -> Tensor:
        return hint_per_sample(inputs.student.logits, inputs.teacher.logits_at(1.0))
