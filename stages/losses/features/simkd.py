"""SimKD: regression of the teacher's last map through a projector, under the teacher's own classifier.

Chen et al. 2022, "Knowledge Distillation with the Reused Teacher Classifier", CVPR (arXiv 2203.14001). Projector and
classifier are part of the student (`distillation/classifier_reuse.py`), so that the loss is one mean squared error.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kdpipe.stages.config import PathStr, max_value, section
from kdpipe.stages.losses.base import MapLoss
from kdpipe.stages.losses.features.hint import hint_loss
from kdpipe.stages.losses.shapes import Layers, Size, map_size
from kdpipe.stages.targets.feature_spec import FeatureSpec, Shape


@section
class SimKD(MapLoss):
    """Mean squared error of the last map; the student has the teacher's classifier, which is frozen.

    The paper trains on this loss alone, with a hard-label weight of 0.

    Attributes:
        layers: the one pair of (student layer, teacher layer), the maps that each network's classifier sees averaged;
            a projector follows the student's.
        classifier: module path of the student's classifier, which the teacher's last linear layer replaces; by default
            the student's last layer.
        factor: how many times narrower than the teacher's map the projector is inside; 2 as in the authors' code.
    """

    paper: ClassVar[str] = "Chen et al. 2022, arXiv 2203.14001"
    requires: ClassVar[str] = "map [C, H, W] of the layer, and the last linear layer once"
    needs_head: ClassVar[bool] = True
    expected: ClassVar[str] = "the teacher's map that its classifier sees averaged, and a student's of the same shape"

    loss: Literal["simkd"] = "simkd"
    layers: Annotated[Layers, Field(max_length=1)] = Field(kw_only=False)
    classifier: PathStr | None = None
    factor: Annotated[int, Field(ge=1), max_value(10**6)] = 2

    def teacher_feature(self, layer: str, student: Shape) -> FeatureSpec:
        """Return the teacher's map; `student` is the shape after the projector."""
        return FeatureSpec(layer, size=map_size(student))

    def common_size(self, student: Shape, teacher: Shape, feature: FeatureSpec) -> Size | None:
        return map_size(teacher) if student[0] == teacher[0] else None

    def distance(self, student: Tensor, teacher: Tensor, feature: FeatureSpec) -> Tensor:
        return hint_loss(student, teacher)
