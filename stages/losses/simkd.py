"""SimKD: the student's last map, through a projector, towards the teacher's, under the teacher's own classifier.

Chen et al. 2022 (arXiv 2203.14001). Projector and classifier are part of the student (`stages/reuse_classifier.py`), so
that all that is left to the loss is one mean squared error.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from stages.config import Place, at_most, section
from stages.forms import Shape, Wanted, pool_to, widened
from stages.losses.entry import Entry, students_of
from stages.losses.hint import hint_loss, hint_per_sample
from stages.losses.match_size import Size, cannot_join, map_size, poolable
from stages.losses.said import Facts, Said, Shapes, TeacherShapes
from stages.schedules import Amount


@section
class SimKDConfig(Entry):
    """weight times the mean squared error of the last map; the student has the teacher's classifier, which is frozen.

    layers: the one pair of (student layer, teacher layer) whose maps each network's classifier sees averaged; in the
    student a projector follows it. The paper trains on this alone, with hard labels at weight 0 and no other loss.
    classifier: the paths of (the student's classifier, which goes, the teacher's linear layer, which takes its place).
    factor: the projector is this many times narrower inside than the teacher's map. teacher: the file with the
    teacher's weights, of which only the classifier's are used; by default the run folder's own teacher.
    """

    paper: ClassVar[str] = "Chen et al. 2022, arXiv 2203.14001"

    loss: Literal["simkd"]
    layers: Annotated[tuple[tuple[str, str], ...], Field(min_length=1, max_length=1)]
    classifier: tuple[str, str] = ("fc", "fc")
    factor: Annotated[int, Field(ge=1), at_most(10**6)] = 2
    teacher: Place | None = None
    weight: Amount = 1.0

    def student_layers(self) -> tuple[str, ...]:
        return students_of(self.layers)

    def wants(self, student: Shapes) -> tuple[Wanted, ...]:
        """`student`: the shapes of the student that has the projector already."""
        return tuple(Wanted(theirs, size=map_size(student[mine])) for mine, theirs in self.layers)

    def build(self, student: Shapes, teacher: TeacherShapes, facts: Facts) -> nn.Module:
        (wanted,) = self.wants(student)
        pair = self.layers[0]
        return SimKD(pair[0], wanted, _size(pair, student[pair[0]], teacher[wanted]))


def _size(pair: tuple[str, str], student: Shape, teacher: Shape) -> Size:
    """The teacher's (H, W), to which the student's projected maps are pooled. Raises RecipeError, with both shapes."""
    size = map_size(teacher)
    if size is None or not poolable(student, size) or student[0] != teacher[0]:
        raise cannot_join(
            "simkd", pair, student, teacher, "the teacher's map that its classifier sees averaged, and one of like size"
        )
    return size


class SimKD(nn.Module):
    """The squared error of each sample, [B]; size: the teacher's (H, W)."""

    def __init__(self, layer: str, wanted: Wanted, size: Size) -> None:
        super().__init__()
        self.layer = layer
        self.wanted = wanted
        self.size = size

    def forward(self, said: Said) -> Tensor:
        projected = pool_to(widened(said.student.features[self.layer]), self.size)
        return hint_per_sample(projected, said.teacher.features[self.wanted])


def simkd_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of maps [B, C, H, W] and [B, C, H', W'], the larger averaged down; a scalar in float32 or
    wider.
    """
    projected, teacher = widened(projected), widened(teacher)
    own = pool_to(projected, (teacher.shape[2], teacher.shape[3]))
    return hint_loss(own, pool_to(teacher, (projected.shape[2], projected.shape[3])))
