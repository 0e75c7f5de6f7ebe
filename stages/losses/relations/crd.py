"""Contrastive representation distillation.

CRD: Tian, Krishnan, Isola 2020, "Contrastive Representation Distillation", ICLR (arXiv 1910.10699). The student's
embedding of an image is pulled toward the teacher's embedding of the same image and pushed away from those of other
images, and vice versa. In the paper the negatives come from memory banks of both networks' embeddings. The store has
the teacher's current features of any sample, so that only the student needs a memory bank.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import max_value, section
from kdpipe.stages.losses.base import FeatureLoss
from kdpipe.stages.losses.inputs import DatasetInfo, LossInputs, Negatives, Shapes, TeacherShapes
from kdpipe.stages.losses.relations.nce import Memory, NCELoss
from kdpipe.stages.losses.relations.relation import Embedding
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.numerics import normalize_rows, to_float32
from kdpipe.stages.targets.feature_spec import POOLED, FeatureSpec, Shape


@section
class CRD(FeatureLoss):
    """Noise-contrastive error in matching embeddings of the same image between student and teacher.

    Defaults are those of RepDistiller.

    Attributes:
        layers: pairs of (student layer, teacher layer), of which maps are average-pooled to vectors: usually the last
            before the classifier.
        dim: width of the embeddings: linear layers on both sides, which train with the student.
        num_negatives: number of other samples that each batch is contrasted with; all samples of a batch share them,
            except those of their own class, as a set per sample would need batch x num_negatives x dim numbers.
        temperature: divides the products of embeddings.
        momentum: share of a sample's old embedding that a memory bank keeps when the sample is seen again.
        memory: "store" reads the teacher's features of the negatives from the store and embeds them at each step;
            "bank" keeps memory banks of both networks, as in the paper. A memory bank has data set size x dim float32
            numbers, and is part of each checkpoint.
    """

    paper: ClassVar[str] = "Tian et al. 2020, arXiv 1910.10699"
    requires: ClassVar[str] = "pooled vector [C] of each layer, also of the negatives"
    one_label: ClassVar[bool] = True  # other classes are negatives, and a mixed sample belongs to two

    loss: Literal["crd"] = "crd"
    weight: Scheduled = 0.8
    dim: Annotated[int, Field(ge=1), max_value(10**6)] = 128
    num_negatives: Annotated[int, Field(ge=1), max_value(2**31)] = 16384
    temperature: Annotated[float, Field(gt=0), max_value(10**4)] = 0.07
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    memory: Literal["store", "bank"] = "store"

    @property
    def needs_labels(self) -> bool:
        return self.samples.needs_single_label  # without a label all other samples are negatives

    @property
    def negative_features(self) -> tuple[FeatureSpec, ...]:
        return self.required_features({}) if self.memory == "store" else ()

    def teacher_feature(self, layer: str, student: Shape) -> FeatureSpec:
        return FeatureSpec(layer, POOLED)

    def build(self, student: Shapes, teacher: TeacherShapes, dataset: DatasetInfo) -> nn.Module:
        return CRDModule(self, student, teacher, dataset.num_samples)


class CRDModule(nn.Module):
    """The loss of each sample in both directions, [B], summed over the pairs of layers; see `CRDOfLayer`."""

    def __init__(self, config: CRD, student: Shapes, teacher: TeacherShapes, num_samples: int) -> None:
        super().__init__()
        self.sources = tuple(zip(config.student_layers(), config.required_features(student), strict=True))
        self.layers = nn.ModuleList(
            CRDOfLayer(config, student[layer], teacher[feature], num_samples) for layer, feature in self.sources
        )

    def forward(self, inputs: LossInputs) -> Tensor:
        if inputs.negatives is None:
            raise ValueError("crd needs negatives")
        parts = [
            loss(inputs, inputs.negatives, layer, feature)
            for loss, (layer, feature) in zip(self.layers, self.sources, strict=True)
        ]
        return torch.stack(parts).sum(0)


class CRDOfLayer(nn.Module):
    """The NCE loss of each sample, [B], at one pair of layers: student against teacher plus teacher against student.

    With memory "store" the student's anchors are compared with fresh embeddings of the teacher's features, so that the
    teacher's embedding learns from both directions; with "bank" they are compared with a memory bank, and it learns
    from its own direction alone. The teacher's anchors are always compared with a memory bank of the student. Memory
    banks have no gradient, and are updated only in training, after they were read.
    """

    def __init__(self, config: CRD, student: Shape, teacher: Shape, num_samples: int) -> None:
        super().__init__()
        self.student, self.teacher = Embedding(student, config.dim), Embedding(teacher, config.dim)
        self.of_student, self.of_teacher = (NCELoss(config.temperature, num_samples) for _ in range(2))
        self.students = Memory(num_samples, config.dim, config.momentum)
        self.teachers = Memory(num_samples, config.dim, config.momentum) if config.memory == "bank" else None

    def forward(self, inputs: LossInputs, negatives: Negatives, layer: str, feature: FeatureSpec) -> Tensor:
        student = _embed(self.student, inputs.student.features[layer])
        teacher = _embed(self.teacher, inputs.teacher.features[feature])
        labels = inputs.labels[:, None]
        is_unlabeled = (labels < 0) | (negatives.labels < 0)  # then only the sample itself is no negative
        is_negative = torch.where(is_unlabeled, inputs.ranks[:, None] != negatives.ranks, labels != negatives.labels)
        if self.teachers is None:
            of_teacher = teacher, _embed(self.teacher, negatives.features[feature])
        else:
            of_teacher = self.teachers.rows[inputs.ranks], self.teachers.rows[negatives.ranks]
        of_student = self.students.rows[inputs.ranks], self.students.rows[negatives.ranks]
        # Embeddings of an untrained layer point in nearly the same direction, which would decide Z; the rows of a new
        # memory bank are spread evenly.
        first = of_student if self.teachers is None else None
        loss: Tensor = self.of_student(student, of_teacher, is_negative, first_among=first)
        loss = loss + self.of_teacher(teacher, of_student, is_negative)
        if self.training:
            self.students.update(inputs.ranks, student)
            if self.teachers is not None:
                self.teachers.update(inputs.ranks, teacher)
        return loss


def _embed(embedding: nn.Module, features: Tensor) -> Tensor:
    return normalize_rows(to_float32(embedding(features)))
