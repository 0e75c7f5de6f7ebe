"""Which samples a loss is about, and how much each counts: judged by what the teacher says of them."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stages.config import section
from stages.features import TeacherOutputs
from stages.losses.global_batch import gathered, gathered_from


@section
class Selection:
    """filter: "all" samples; the "hard" ones, a `fraction` of each batch to whose labels the teacher gives the least
    probability; or the "correct" ones, which the teacher gets right.

    weighting: "equal", or by the teacher's "entropy" (the unsure ones more), its "certainty" (the sure ones more), or its
    "correctness" (the probability that it gives to the label); in proportion, with a mean of 1 over the batch.
    """

    filter: Literal["all", "hard", "correct"] = "all"
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    weighting: Literal["equal", "entropy", "certainty", "correctness"] = "equal"

    @property
    def judges(self) -> bool:
        """Whether the teacher's probabilities are looked at."""
        return self.filter != "all" or self.weighting != "equal"

    @property
    def goes_by_label(self) -> bool:
        """Whether a sample's one true class is."""
        return self.filter != "all" or self.weighting == "correctness"


def chosen(config: Selection, teacher: TeacherOutputs, labels: Tensor) -> Tensor | None:
    """The samples that the loss is about, int64 [n], in the batch's order; None for all of them. labels: int64 [B].

    The hard ones are those of the batch of all processes: this one may have none.
    """
    if config.filter == "all":
        return None
    logits = teacher.logits_at(1.0)
    if config.filter == "correct":
        return (logits.argmax(1) == labels).nonzero()[:, 0]
    given = F.log_softmax(logits, 1).gather(1, labels[:, None])[:, 0]
    everyone, start = gathered_from(given)
    num_hard = max(1, math.ceil(round(config.fraction * len(everyone), 6)))  # 0.07 * 100 is above 7
    hard = torch.argsort(everyone, stable=True)[:num_hard].sort().values
    return hard if len(everyone) == len(given) else hard[(hard >= start) & (hard < start + len(given))] - start


def weights(config: Selection, teacher: TeacherOutputs, labels: Tensor) -> Tensor | None:
    """How much each sample counts, float32 [B], 1 in the mean over all processes; None where all count alike."""
    if config.weighting == "equal":
        return None
    log_given = F.log_softmax(teacher.logits_at(1.0), 1)
    entropy = -(log_given.exp() * log_given).sum(1) / math.log(max(2, log_given.shape[1]))
    raw = {
        "entropy": entropy,
        "certainty": 1 - entropy,
        "correctness": log_given.gather(1, labels[:, None])[:, 0].exp(),
    }[config.weighting].clamp_min(0)
    return raw / gathered(raw).mean().clamp_min(torch.finfo(raw.dtype).tiny)
