"""What losses have in common that compare how the samples of a batch lie to each other, in the student and in the
teacher: they are one number for the global batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stages.forms import Wanted, take_form
from stages.losses.entry import Pairs
from stages.losses.global_batch import gathered
from stages.losses.said import Said


class Relation(nn.Module):
    """A loss of the student's and the teacher's features of the global batch, summed over the pairs of layers."""

    def __init__(self, pairs: Pairs, form: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        """loss: student's [B, ...] and teacher's [B, ...], both in the form `form` of their layers, to a scalar."""
        super().__init__()
        self.pairs = pairs
        self.form = form
        self.loss = loss

    def forward(self, said: Said) -> Tensor:
        parts = [
            self.loss(
                gathered(take_form(Wanted(mine, self.form), said.student.features[mine])),
                gathered(said.teacher.features[Wanted(theirs, self.form)]),
            )
            for mine, theirs in self.pairs
        ]
        return torch.stack(parts).sum()
