"""What every `[[distill]]` entry of a recipe has, and what it tells the rest of kdpipe about its loss."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from stages.config import at_most, section
from stages.forms import MAP, Wanted
from stages.losses.said import Facts, Shapes, TeacherShapes
from stages.losses.selection import Selection
from stages.schedules import Amount, Temperature

Pairs = Annotated[tuple[tuple[str, str], ...], Field(min_length=1)]
"""Pairs of (student's module, teacher's module)."""


@section
class Entry:
    """weight: what the loss is multiplied by. store: which of `student.stores` teaches, counted from 0; by default
    logits are those of all of them together, features those of the first. samples: of which samples, and how much.

    What a loss says of itself: `paper`; `per_sample`, whether it is a mean of one number a sample, so that samples can
    be weighed; `one_label`, whether it has no meaning for mixed samples; `whole_logits`, whether it needs more than a
    softmax of the teacher's logits, so that top-k stores do not serve; `on_logits`, whether it is about logits; and
    `input_gradient`, whether it looks at the gradient of the student's cross entropy by the pixels.
    """

    paper: ClassVar[str]
    per_sample: ClassVar[bool] = True
    one_label: ClassVar[bool] = False
    whole_logits: ClassVar[bool] = False
    on_logits: ClassVar[bool] = False
    input_gradient: ClassVar[bool] = False

    loss: str
    weight: Amount = 1.0
    store: Annotated[int, Field(ge=0), at_most(1000)] | None = None
    samples: Selection = Field(default_factory=Selection)

    @property
    def num_others(self) -> int:
        """How many other samples of the data set it contrasts a batch with."""
        return 0

    @property
    def wanted_of_others(self) -> tuple[Wanted, ...]:
        """What it wants of the teacher about those."""
        return ()

    def student_layers(self) -> tuple[str, ...]:
        """The student's modules whose outputs the loss looks at."""
        return ()

    def wants(self, student: Shapes) -> tuple[Wanted, ...]:
        """What the loss wants of the teacher beside logits, given the shapes of the student's features."""
        return ()

    def temperatures(self) -> tuple[Temperature, ...]:
        """The temperatures at which the loss takes the softmax of the teacher's logits."""
        return ()

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        """The loss as a module: `Said` to the unweighted loss, [B] where it is `per_sample`, else a scalar.

        What trains with the student, adapters and embeddings, is in it. Raises RecipeError, with both shapes, where
        features cannot be joined.
        """
        raise NotImplementedError


@section
class Response(Entry):
    """A loss on logits. standardize: both sides' logits have mean 0 and standard deviation 1 over the classes first
    (`standardise.py`).
    """

    on_logits: ClassVar[bool] = True

    standardize: bool = False


def teachers_of(pairs: Pairs, form: str = MAP) -> tuple[Wanted, ...]:
    """One form of each pair's teacher's layer."""
    return tuple(Wanted(theirs, form) for _, theirs in pairs)


def students_of(pairs: Pairs) -> tuple[str, ...]:
    """Each pair's student's layer."""
    return tuple(mine for mine, _ in pairs)
