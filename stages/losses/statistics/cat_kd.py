"""Class activation maps: where each class is seen, by the classifier's weights at each position of the last map.

CAT-KD: Guo et al. 2023, "Class Attention Transfer Based Knowledge Distillation", CVPR (arXiv 2304.12777).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import max_value, section
from kdpipe.stages.data.tasks import CLASSIFICATION, MULTILABEL, Task
from kdpipe.stages.losses.base import FeatureLoss, PairedModule
from kdpipe.stages.losses.inputs import DatasetInfo, Shapes, TeacherShapes
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.losses.shapes import Layers, Size, map_size, poolable, shape_mismatch_error
from kdpipe.stages.models.tokens import CAM
from kdpipe.stages.numerics import normalize_rows, to_float32
from kdpipe.stages.targets.feature_spec import MAP, FeatureSpec, Shape
from kdpipe.stages.targets.statistics import pool_to


@section
class CATKD(FeatureLoss):
    """Mean squared error of the class activation maps, averaged to few positions first.

    Defaults are those of the authors' code for a ResNet-8x4 on CIFAR-100. Between networks of different families it
    normalizes, with a weight of 600 and 4 x 4 positions (ShuffleNets), or 15 to 40 and 2 x 2 (MobileNetV2).

    Attributes:
        layers: the one pair of (student layer, teacher layer), the maps whose average goes into the classifiers.
        size: height and width that the maps are averaged to.
        normalize: whether each class's map is scaled to length 1.
    """

    paper: ClassVar[str] = "Guo et al. 2023, arXiv 2304.12777"
    requires: ClassVar[str] = "class activation maps [C, 2, 2]"
    compares_classes: ClassVar[bool] = True
    tasks: ClassVar[tuple[Task, ...]] = (CLASSIFICATION, MULTILABEL)

    loss: Literal["cat_kd"] = "cat_kd"
    layers: Annotated[Layers, Field(max_length=1)] = Field(kw_only=False)
    weight: Scheduled = 15.0
    size: Annotated[int, Field(ge=1), max_value(1000)] = 2
    normalize: bool = False

    def student_layers(self) -> tuple[str, ...]:
        return (f"{self.layers[0][0]}.{CAM}",)

    def required_features(self, student: Shapes) -> tuple[FeatureSpec, ...]:
        own = map_size(student.get(self.student_layers()[0], ())) or (self.size, self.size)
        return (FeatureSpec(f"{self.layers[0][1]}.{CAM}", MAP, (min(self.size, own[0]), min(self.size, own[1]))),)

    def build(self, student: Shapes, teacher: TeacherShapes, dataset: DatasetInfo) -> nn.Module:
        (layer,), (feature,) = self.student_layers(), self.required_features(student)
        pair = self.build_pair((layer, feature.layer), feature, student[layer], teacher[feature])
        return PairedModule((layer,), (feature,), (pair,))

    def build_pair(self, pair: tuple[str, str], feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        size = map_size(teacher)
        if size is None or not poolable(student, size) or student[0] != teacher[0]:
            raise shape_mismatch_error(self.loss, pair, student, teacher, "the last maps of networks of equal classes")
        return CATKDModule(size, normalize=self.normalize)


class CATKDModule(nn.Module):
    """The loss of each sample, [B], of class activation maps that are averaged to `size` first."""

    def __init__(self, size: Size, *, normalize: bool) -> None:
        super().__init__()
        self.size, self.normalize = size, normalize

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cat_kd_loss(pool_to(to_float32(student), self.size), teacher, normalize=self.normalize)


def cat_kd_loss(student: Tensor, teacher: Tensor, *, normalize: bool = False) -> Tensor:
    """Compute the mean squared error of class activation maps [B, C, H, W] of one shape, of each sample, [B].

    With `normalize` each class's map is scaled to length 1 first. The result is float32 or wider.

    Example:
        >>> import torch
        >>> cat_kd_loss(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))
        tensor([1.])
    """
    student = to_float32(student).flatten(2)
    teacher = teacher.to(student.dtype).flatten(2)
    if normalize:
        student, teacher = normalize_rows(student), normalize_rows(teacher)
    return (student - teacher).square().mean((1, 2))
