"""Selection and weighting of samples by the teacher's predictions."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.runtime.collectives import all_gather_with_grad, all_gather_with_offset
from kdpipe.stages.targets.outputs import TeacherTargets


@section
class SampleSelection:
    """Configuration of which samples a loss is computed on, and how they are weighted.

    Attributes:
        filter: "all" samples; "hard", the `fraction` of each batch whose labels get the lowest probability from the
            teacher; or "correct", those that the teacher classifies correctly. The loss is the mean over the selected.
        fraction: share of the batch that "hard" selects.
        weighting: "equal", or in proportion to the teacher's "entropy", its "certainty" (1 - normalized entropy) or its
            "correctness" (probability of the label), with a mean of 1 over the batch.
    """

    filter: Literal["all", "hard", "correct"] = "all"
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.5
    weighting: Literal["equal", "entropy", "certainty", "correctness"] = "equal"

    @property
    def needs_probabilities(self) -> bool:
        """Return whether the teacher's probabilities are used."""
        return self.filter != "all" or self.weighting != "equal"

    @property
    def needs_single_label(self) -> bool:
        """Return whether each sample's single label is used."""
        return self.filter != "all" or self.weighting == "correctness"


def select_samples(config: SampleSelection, teacher: TeacherTargets, labels: Tensor) -> Tensor | None:
    """Return the indices of the selected samples, int64 [n], in batch order; None for all. labels: int64 [B].

    Hard samples are ranked over the batch of all processes, so that this process may have none.
    """
    if config.filter == "all":
        return None
    logits = teacher.logits_at(1.0)
    if config.filter == "correct":
        return (logits.argmax(1) == labels).nonzero()[:, 0]
    log_probabilities = F.log_softmax(logits, 1).gather(1, labels[:, None])[:, 0]
    all_rows, start = all_gather_with_offset(log_probabilities)
    num_hard = max(1, math.ceil(round(config.fraction * len(all_rows), 6)))  # 0.07 * 100 is above 7
    hard = torch.argsort(all_rows, stable=True)[:num_hard].sort().values
    stop = start + len(labels)
    return hard if len(all_rows) == len(labels) else hard[(hard >= start) & (hard < stop)] - start


def compute_sample_weights(config: SampleSelection, teacher: TeacherTargets, labels: Tensor) -> Tensor | None:
    """Return the samples' weights, float32 [B], of mean 1 over all processes; None if all are equal."""
    if config.weighting == "equal":
        return None
    log_probabilities = F.log_softmax(teacher.logits_at(1.0), 1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(1) / math.log(max(2, log_probabilities.shape[1]))
    raw = {
        "entropy": entropy,
        "certainty": 1 - entropy,
        "correctness": log_probabilities.gather(1, labels[:, None])[:, 0].exp(),
    }[config.weighting].clamp_min(0)
    return raw / all_gather_with_grad(raw).mean().clamp_min(torch.finfo(raw.dtype).tiny)
