"""The main directions of two consecutive layers' maps, and how far they are apart, by singular value decomposition.

KD-SVD: Lee, Kim and Song 2018, "Self-supervised Knowledge Distillation Using Singular Value Decomposition", ECCV
(arXiv 1807.06819), in the form of RepDistiller and mdistiller.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import section
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import FeatureLoss
from kdpipe.stages.losses.inputs import DatasetInfo, LossInputs, Shapes, TeacherShapes
from kdpipe.stages.losses.shapes import shape_mismatch_error
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.targets.feature_spec import FeatureSpec

MORE = 3
"""So many more directions of the student are looked at for one that is like the teacher's."""

WIDTH = 8.0
"""Twice the variance of the radial basis function."""

EPS = 1e-9
"""Eigenvalues that differ by less than this share of the largest are the same: they have no gradient."""


@section
class KDSVD(FeatureLoss):
    """Squared differences of the distances between the main directions of consecutive layers' channels.

    The directions are the first right singular vectors of a map [H W, C]; the student's are the most similar of its
    first ones. Distances go through a radial basis function. The layers of student and teacher have the same numbers of
    channels; sizes may differ. Defaults are those of mdistiller.

    Attributes:
        layers: two or more pairs of (student layer, teacher layer), from shallow to deep.
        k: directions of each layer.
    """

    paper: ClassVar[str] = "Lee et al. 2018, arXiv 1807.06819"

    loss: Literal["kdsvd"] = "kdsvd"
    k: Annotated[int, Field(ge=1, le=64)] = 1

    def build(self, student: Shapes, teacher: TeacherShapes, dataset: DatasetInfo) -> nn.Module:
        if len(self.layers) < 2:
            raise RecipeError("kdsvd compares distances between two layers: give two or more pairs of layers.")
        features = self.required_features(student)
        for pair, feature in zip(self.layers, features, strict=True):
            own, other = student[pair[0]], teacher[feature]
            if not len(own) == len(other) == 3 or own[0] != other[0] or own[0] < self.k:
                expected = f"layers with maps of the same number of channels, {self.k} or more"
                raise shape_mismatch_error(self.loss, pair, own, other, expected)
        return KDSVDModule(self, features)


class KDSVDModule(nn.Module):
    """The loss of each sample, [B]."""

    def __init__(self, config: KDSVD, features: Sequence[FeatureSpec]) -> None:
        super().__init__()
        self.layers, self.features, self.k = config.student_layers(), tuple(features), config.k

    def forward(self, inputs: LossInputs) -> Tensor:
        student = [inputs.student.features[layer] for layer in self.layers]
        return kdsvd_loss(student, [inputs.teacher.features[feature] for feature in self.features], self.k)


def kdsvd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], k: int = 1) -> Tensor:
    """Compute the sum of (rbf_s - rbf_t)^2 over consecutive layers, channels of both and directions, per sample, [B].

    rbf = exp(-(v_i - w_j)^2 / 8) of the directions v [C, k] of a layer and w of the one before it, both times the
    teacher's singular values, normalized to length 1. A direction's entries add up to a positive number.

    Maps of each layer are [B, C, H, W], of student and teacher with the same C. The result is float32 or wider.

    Example:
        >>> maps = [torch.eye(3)[None, :, None], torch.ones(1, 2, 2, 2)]
        >>> kdsvd_loss(maps, maps)
        tensor([0.])
    """
    directions = [aligned_directions(*maps, k) for maps in zip(student, teacher, strict=True)]
    parts = []
    for before, after in pairwise(directions):
        own, other = ((after[i][:, :, None] - before[i][:, None]).square() / WIDTH for i in (0, 1))
        parts.append(((-own).exp() - (-other).exp()).square().flatten(1).sum(1))
    return torch.stack(parts).sum(0).to(to_float32(student[0]).dtype)


def aligned_directions(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return k directions [B, C, k] of a student's map, and those of the teacher's, which they are aligned with.

    For each of the teacher's the student's first k + 3 have one of the largest cosine, whatever its sign, which is
    turned to its side. Both are times the teacher's singular values.
    """
    own, _ = directions_of(student, k + MORE)
    wanted, values = directions_of(teacher.detach(), k)
    cosines = own.mT @ wanted
    sizes = cosines.detach().abs()
    chosen = torch.where(sizes == sizes.amax(1, keepdim=True), cosines.detach().sign(), 0.0)
    scale = F.normalize(values, dim=1)[:, None]
    return (own @ chosen) * scale, wanted * scale


def directions_of(maps: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the first right singular vectors of maps [B, C, H, W] as [H W, C], and singular values: [B, C, n], [B, n].

    In float64; n is `count`, or C if that is smaller.
    """
    rows = maps.double().flatten(2)
    squares, vectors = _Eigen.apply(rows @ rows.mT)
    first = vectors.flip(2)[:, :, :count]
    sign = torch.where(first.detach().sum(1, keepdim=True) < 0, -1.0, 1.0)
    return first * sign, squares.flip(1)[:, :count].clamp(min=0).sqrt()


class _Eigen(torch.autograd.Function):
    """Eigenvalues [B, C], ascending and without a gradient, and eigenvectors [B, C, C] of symmetric matrices.

    The gradient of vectors of equal eigenvalues, which torch's is not finite for, is left out.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrices)
        ctx.save_for_backward(values, vectors)
        ctx.mark_non_differentiable(values)
        return values, vectors

    @staticmethod
    def backward(ctx: Any, _: Tensor, of_vectors: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        gaps = values[:, None] - values[:, :, None]  # [B, j, i]: eigenvalue i less eigenvalue j
        differ = gaps.abs() > EPS * values.abs().amax(1)[:, None, None]
        inverse = torch.where(differ, 1 / torch.where(differ, gaps, 1.0), 0.0)
        inner = inverse * (vectors.mT @ of_vectors)
        gradient: Tensor = vectors @ inner @ vectors.mT
        return (gradient + gradient.mT) / 2
