"""Contrastive representation distillation: Tian, Krishnan, Isola 2020 (arXiv 1910.10699).

The student's embedding of a picture shall be near the teacher's of the same picture, and far from the teacher's of
others, and the other way round. In the paper the others come from memories of what both networks said of each sample
when it was seen last. A store knows what the teacher says of any sample now, so that only the student needs a memory.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stages.config import at_most, section
from stages.forms import POOLED, Shape, Wanted, widened
from stages.losses.contrast import Contrast, Memory
from stages.losses.embedding import Embedding
from stages.losses.entry import Entry, Pairs, students_of, teachers_of
from stages.losses.said import Facts, Others, Said, Shapes, TeacherShapes
from stages.losses.unit_rows import unit_rows
from stages.schedules import Amount


@section
class CRDConfig(Entry):
    """weight times the errors in telling the other network's embedding of the same picture from those of others.

    layers: pairs of (student layer, teacher layer), maps by their means: usually the last before the classifier.
    dim: what both sides are embedded in, by linear layers that train with the student. temperature: of the products of
    embeddings. num_negatives: how many other samples each batch is contrasted with; all samples of a batch have the
    same, less those of their own class, as lists of each sample's own would need batch x num_negatives x dim numbers.
    memory: "store", the teacher's other samples are read and embedded anew at each step; or "bank", both networks' are
    remembered, as in the paper. A memory has data set x dim float32 numbers, and is part of each checkpoint.
    momentum: how much of what was remembered of a sample is kept when it is seen again.
    """

    paper: ClassVar[str] = "Tian et al. 2020, arXiv 1910.10699"

    loss: Literal["crd"]
    layers: Pairs
    weight: Amount = 0.8
    dim: Annotated[int, Field(ge=1), at_most(10**6)] = 128
    num_negatives: Annotated[int, Field(ge=1), at_most(2**31)] = 16384
    temperature: Annotated[float, Field(gt=0), at_most(10**4)] = 0.07
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    memory: Literal["store", "bank"] = "store"

    @property
    def num_others(self) -> int:
        return self.num_negatives

    @property
    def wanted_of_others(self) -> tuple[Wanted, ...]:
        return teachers_of(self.layers, POOLED) if self.memory == "store" else ()

    def student_layers(self) -> tuple[str, ...]:
        return students_of(self.layers)

    def wants(self, student: Shapes) -> tuple[Wanted, ...]:
        return teachers_of(self.layers, POOLED)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        return CRD(self, student, teacher, facts)


class CRD(nn.Module):
    """Each sample's errors in both directions, [B], summed over the pairs of layers; see `CRDOfLayer`."""

    def __init__(self, config: CRDConfig, student: Shapes, teacher: TeacherShapes, facts: Facts) -> None:
        super().__init__()
        self.pairs = config.layers
        shapes = [(student[mine], teacher[Wanted(theirs, POOLED)]) for mine, theirs in self.pairs]
        self.layers = nn.ModuleList(CRDOfLayer(config, *shape, facts.num_samples) for shape in shapes)

    def forward(self, said: Said) -> Tensor:
        if said.others is None:
            raise ValueError("CRD contrasts a batch with other samples: Said.others is needed.")
        parts = [
            layer(said, said.others, mine, Wanted(theirs, POOLED))
            for layer, (mine, theirs) in zip(self.layers, self.pairs, strict=True)
        ]
        return torch.stack(parts).sum(0)


class CRDOfLayer(nn.Module):
    """Student against teacher plus teacher against student, at one pair of layers, [B].

    memory "store": a student's positive and negatives are embedded from what the teacher says, so that the teacher's
    embedding learns from both directions. "bank": they are remembered, and it learns from its own alone. A teacher's
    positive and negatives are remembered in both. What is remembered has no gradient, and changes in training only,
    after it was read.
    """

    def __init__(self, config: CRDConfig, student: Shape, teacher: Shape, num_samples: int) -> None:
        super().__init__()
        self.student, self.teacher = Embedding(student, config.dim), Embedding(teacher, config.dim)
        self.of_student, self.of_teacher = (Contrast(config.temperature, num_samples) for _ in range(2))
        self.students = Memory(num_samples, config.dim, config.momentum)
        self.teachers = Memory(num_samples, config.dim, config.momentum) if config.memory == "bank" else None

    def forward(self, said: Said, others: Others, mine: str, theirs: Wanted) -> Tensor:
        student = _direction(self.student, said.student.features[mine])
        teacher = _direction(self.teacher, said.teacher.features[theirs])
        is_other = said.labels[:, None] != others.labels
        if self.teachers is None:
            positives, negatives = teacher, _direction(self.teacher, others.features[theirs])
        else:
            positives, negatives = _recalled(self.teachers, said, others)
        remembered = _recalled(self.students, said, others)
        # Fresh embeddings of an untrained layer all look one way, and would make Z what their angle happens to be; a
        # memory begins with all directions alike.
        first = remembered if self.teachers is None else None
        loss = self.of_student(student, (positives, negatives), is_other, first_among=first)
        loss = loss + self.of_teacher(teacher, remembered, is_other)
        if self.training:
            self.students.remember(said.ranks, student)
            if self.teachers is not None:
                self.teachers.remember(said.ranks, teacher)
        summed: Tensor = loss
        return summed


def _direction(embed: nn.Module, features: Tensor) -> Tensor:
    return unit_rows(widened(embed(features)))


def _recalled(memory: Memory, said: Said, others: Others) -> tuple[Tensor, Tensor]:
    """What is remembered of the batch's samples, [B, D], and of others, [K, D]."""
    return memory.rows[said.ranks], memory.rows[others.ranks]
