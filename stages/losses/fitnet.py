"""FitNets as the paper trains them, in two stages: first hints alone, then everything else. Romero et al. 2015.

arXiv 1412.6550, section 3.1 and algorithm 1. Stage one trains the student up to its hint layer, together with the
adapter, on nothing but the hint. Stage two trains the whole student on labels and softened logits, starting from there;
the hint takes no part in it. `hint` trains both at once, as the field's reference code does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from stages.config import at_most, section
from stages.forms import Wanted
from stages.losses.entry import Entry, Pairs, students_of, teachers_of
from stages.losses.hint import Hint
from stages.losses.said import Facts, Shapes, TeacherShapes
from stages.schedules import Amount


@section
class FitNetConfig(Entry):
    """Before the student's own training, the mean squared error at each pair of layers alone, one pair after another.

    layers: pairs of (student layer, teacher layer), each trained by itself in the order given: several pairs, from
    shallow to deep, are layer-wise training. stage_epochs: the epochs of each pair, beside those of the training that
    follows, to which it adds nothing. weight: of the error in these epochs.
    """

    paper: ClassVar[str] = "Romero et al. 2015, arXiv 1412.6550"

    loss: Literal["fitnet"]
    layers: Pairs
    stage_epochs: Annotated[int, Field(ge=1), at_most(10**6)] = 30
    weight: Amount = 1.0

    def student_layers(self) -> tuple[str, ...]:
        return students_of(self.layers)

    def wants(self, student: Shapes) -> tuple[Wanted, ...]:
        return teachers_of(self.layers)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        return Hint(self.layers, student, teacher)

    def stages(self) -> tuple[FitNetConfig, ...]:
        """One section for each pair, in the order in which they are trained."""
        return tuple(replace(self, layers=(pair,)) for pair in self.layers)
