"""Feature distillation at the place before the ReLU, with a margin for the teacher's negative values.

OFD: Heo et al. 2019, "A Comprehensive Overhaul of Feature Distillation", ICCV (arXiv 1904.01866).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdpipe.stages.config import section
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import FeatureLoss, PairedModule
from kdpipe.stages.losses.features.ab import HalvedModule
from kdpipe.stages.losses.inputs import DatasetInfo, Shapes, TeacherShapes
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.losses.shapes import Pair, map_size, poolable, shape_mismatch_error
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.runtime.collectives import all_gather_row
from kdpipe.stages.targets.feature_spec import MAP, FeatureSpec, Shape
from kdpipe.stages.targets.statistics import pool_to


@section
class OFD(FeatureLoss):
    """Partial squared distance of maps before the ReLU, summed over the map.

    The teacher's negative values are raised to a margin for each channel, the mean of its negative values; where the
    student is below a target that is not positive, nothing is lost. The student's map goes through a 1x1 convolution
    with batch norm; each pair has half of the weight of the next deeper one. The margins come from the stored maps of
    all batches so far, not from the teacher's batch norms as in the authors' code. Layers are those before a ReLU, such
    as batch norms. The default weight is that of mdistiller.

    Attributes:
        layers: pairs of (student layer, teacher layer), from shallow to deep, before their ReLUs.
    """

    paper: ClassVar[str] = "Heo et al. 2019, arXiv 1904.01866"
    requires: ClassVar[str] = "map [C, H, W] of each layer before its ReLU"

    loss: Literal["ofd"] = "ofd"
    weight: Scheduled = 0.001

    def teacher_feature(self, layer: str, student: Shape) -> FeatureSpec:
        return FeatureSpec(layer, MAP, map_size(student))

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        size = map_size(teacher)
        if size is None or not poolable(student, size):
            raise shape_mismatch_error(self.loss, pair, student, teacher, "layers with maps, the student's no smaller")
        return OFDModule(pair[1], student[0], teacher)

    def build(self, student: Shapes, teacher: TeacherShapes, dataset: DatasetInfo) -> nn.Module:
        paired = super().build(student, teacher, dataset)
        assert isinstance(paired, PairedModule)
        return HalvedModule(paired)


class OFDModule(nn.Module):
    """The loss of each sample, [B], with the adapter of one pair of layers, which trains with the student.

    The sums and numbers of the teacher's negative values, float64 [2, C], are kept with it.
    """

    negatives: Tensor

    def __init__(self, layer: str, channels: int, teacher: Shape) -> None:
        super().__init__()
        self.adapter = nn.Sequential(nn.Conv2d(channels, teacher[0], 1, bias=False), nn.BatchNorm2d(teacher[0]))
        nn.init.kaiming_normal_(self.adapter[0].weight, mode="fan_out")  # type: ignore[arg-type]
        self.register_buffer("negatives", torch.zeros(2, teacher[0], dtype=torch.float64))
        self.size = teacher[1], teacher[2]
        self.layer, self.is_checked = layer, False

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        self._observe(teacher)
        sums, counts = self.negatives
        margin = (sums / counts.clamp(min=1)).to(to_float32(teacher).dtype)
        return ofd_loss(self.adapter(pool_to(student, self.size)), teacher, margin)

    @torch.no_grad()
    def _observe(self, teacher: Tensor) -> None:
        """Count the negative values of a batch, of all processes; raises RecipeError if the first has none at all."""
        negative = teacher.double().clamp(max=0)
        found = torch.stack([one.sum((0, 2, 3)) for one in (negative, (negative < 0).double())])
        self.negatives.copy_(self.negatives + all_gather_row(found).sum(0))
        if not self.is_checked and not torch.compiler.is_compiling():
            self.is_checked = True
            if not bool(self.negatives[1].any()):
                raise RecipeError(
                    f"ofd: the teacher's {self.layer!r} has no negative value, as after a ReLU: choose the layer "
                    "before it, such as its batch norm, for teacher and student."
                )


def ofd_loss(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Compute the sum of (s - max(t, m))^2, but where s <= that and t <= 0, of each sample, [B].

    Maps are [B, C, H, W] of one shape, margins [C], not positive. The result is float32 or wider.

    Example:
        >>> student = torch.tensor([[[[2.0, -5.0, 0.0, -5.0]]]])
        >>> ofd_loss(student, torch.tensor([[[[1.0, 1.0, -9.0, -9.0]]]]), torch.tensor([-2.0]))
        tensor([41.])
    """
    student = to_float32(student)
    teacher = teacher.to(student.dtype)
    target = torch.maximum(teacher, margin.to(student.dtype)[:, None, None])
    counts = (teacher > 0) | (student > target)
    return torch.where(counts, student - target, 0).square().flatten(1).sum(1)
