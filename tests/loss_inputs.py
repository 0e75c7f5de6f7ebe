"""The tensors for which the reference codes' numbers are known, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stages.features import DenseOutputs, Outputs
from stages.forms import Wanted
from stages.losses.said import Said
from stages.schedules import SETTLED, Moment


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT_LOGITS, TEACHER_LOGITS = 3 * drawn(8, 10, seed=1), 3 * drawn(8, 10, seed=2)
LABELS = torch.arange(8) % 10
STUDENT_VECTORS, TEACHER_VECTORS = drawn(8, 16, seed=3), drawn(8, 32, seed=4)
STUDENT_MAPS, TEACHER_MAPS = drawn(8, 16, 8, 8, seed=5).relu(), drawn(8, 32, 8, 8, seed=6).relu()
LARGER_STUDENT_MAPS, THEIR_TEACHER_MAPS = drawn(8, 16, 16, 16, seed=7).relu(), drawn(8, 32, 8, 8, seed=8).relu()
STUDENT_HINTS, TEACHER_HINTS = drawn(8, 32, 8, 8, seed=9), drawn(8, 32, 8, 8, seed=10)


def said(
    student_logits: Tensor = STUDENT_LOGITS,
    teacher_logits: Tensor = TEACHER_LOGITS,
    *,
    labels: Tensor = LABELS,
    student: Mapping[str, Tensor] | None = None,
    teacher: Mapping[Wanted, Tensor] | None = None,
    moment: Moment = SETTLED,
) -> Said:
    """What student and teacher say about a batch; ranks are 0 to B - 1."""
    return Said(
        Outputs(student_logits, student or {}),
        DenseOutputs(teacher_logits, teacher or {}),
        labels,
        torch.arange(len(labels)),
        moment,
    )
