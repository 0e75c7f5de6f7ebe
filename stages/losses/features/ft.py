"""Factor transfer: a paraphraser of the teacher's map, trained first, and a translator of the student's.

FT: Kim et al. 2018, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS (arXiv
1802.04977). The paraphraser is a convolutional autoencoder of the teacher's map, without labels; its code is the
factor. It needs the stored maps alone, and is trained before the student.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdpipe.stages.config import max_value, section
from kdpipe.stages.losses.base import FeatureLoss
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.losses.shapes import Pair, map_size, shape_mismatch_error
from kdpipe.stages.numerics import normalize_rows, to_float32
from kdpipe.stages.targets.feature_spec import FeatureSpec, Shape
from kdpipe.stages.targets.statistics import pool_to

SLOPE = 0.1
"""Of the leaky ReLUs, as in RepDistiller."""


@section
class Paraphrase(FeatureLoss):
    """Mean squared error of the maps that paraphrasers rebuild from their factors: the stage before `ft`."""

    loss: Literal["ft_paraphraser"] = "ft_paraphraser"
    rate: float = 0.5

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        return Paraphraser(teacher[0], int(teacher[0] * self.rate))


@section
class FT(FeatureLoss):
    """Mean absolute difference of normalized factors: translations of student's maps, paraphrases of the teacher's.

    The paraphraser, an autoencoder, is trained alone first, and then fixed; the translator trains with the student.
    Defaults are those of RepDistiller, whose one pair of layers is the last with maps.

    Attributes:
        rate: channels of a factor as a share of the teacher's.
        stage_epochs: epochs of the paraphrasers, before the student's own.
        stage_lr: learning rate of the paraphrasers.
    """

    paper: ClassVar[str] = "Kim et al. 2018, arXiv 1802.04977"

    loss: Literal["ft"] = "ft"
    weight: Scheduled = 200.0
    rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    stage_epochs: Annotated[int, Field(ge=1), max_value(10**6)] = 30
    stage_lr: Annotated[float, Field(gt=0), max_value(1000)] = 0.01

    def paraphrase(self) -> Paraphrase:
        """Return the loss of the stage that trains the paraphrasers."""
        return Paraphrase(layers=self.layers, store=self.store, rate=self.rate)

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        if map_size(student) is None or map_size(teacher) is None:
            raise shape_mismatch_error(self.loss, pair, student, teacher, "layers with maps")
        if int(teacher[0] * self.rate) < 1:
            expected = f"a rate above {1 / teacher[0]:g}, so that a factor has a channel"
            raise shape_mismatch_error(self.loss, pair, student, teacher, expected)
        return FTModule(student[0], teacher[0], int(teacher[0] * self.rate))


class FTModule(nn.Module):
    """The loss of each sample, [B], with the translator of one pair of layers, which trains with the student."""

    def __init__(self, student: int, teacher: int, factors: int) -> None:
        super().__init__()
        self.translator = _encoder(student, factors, norms=True)
        self.paraphraser = Paraphraser(teacher, factors).requires_grad_(False)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return ft_loss(self.translator(student), self.paraphraser.encoder(teacher))


class Paraphraser(nn.Module):
    """An autoencoder of maps [B, C, H, W], whose code has `factors` channels: the squared error of each sample, [B]."""

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__()
        self.encoder = _encoder(channels, factors, norms=False)
        widths = ((factors, factors), (factors, channels), (channels, channels))
        layers = ((nn.ConvTranspose2d(*each, 3, padding=1), nn.LeakyReLU(SLOPE)) for each in widths)
        self.decoder = nn.Sequential(*(one for pair in layers for one in pair))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        rebuilt = to_float32(self.decoder(self.encoder(teacher)))
        return F.mse_loss(rebuilt, teacher.to(rebuilt.dtype), reduction="none").flatten(1).mean(1)


def _encoder(channels: int, factors: int, *, norms: bool) -> nn.Sequential:
    """Return three 3x3 convolutions with leaky ReLUs, [B, channels, H, W] to [B, factors, H, W]."""
    layers: list[nn.Module] = []
    for inner, outer in ((channels, channels), (channels, factors), (factors, factors)):
        layers.append(nn.Conv2d(inner, outer, 3, padding=1))
        layers += [nn.BatchNorm2d(outer)] if norms else []
        layers.append(nn.LeakyReLU(SLOPE))
    return nn.Sequential(*layers)


def ft_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean absolute difference of `factor_map` of student and teacher, of each sample, [B].

    Factors are [B, C, H, W]; the larger map is average-pooled. The result is float32 or wider.

    Example:
        >>> ft_loss(torch.tensor([[[[3.0, 4.0]]]]).sqrt(), torch.ones(1, 5, 1, 2))
        tensor([0.1000])
    """
    student, teacher = to_float32(student), to_float32(teacher)
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    own, other = (factor_map(pool_to(one, size)) for one in (student, teacher))
    return (own - other.to(own.dtype)).abs().mean(1)


def factor_map(factors: Tensor) -> Tensor:
    """Compute the mean over channels of the squares, L2-normalized over the positions: [B, C, H, W] to [B, H W]."""
    rows: Tensor = normalize_rows(factors.square().mean(1).flatten(1))
    return rows


def load_paraphrasers(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the paraphrasers of a loss on pairs of layers from the tensors of their own stage, by name."""
    for number, pair in enumerate(one for one in module.modules() if isinstance(one, FTModule)):
        marker = f".pairs.{number}."
        own = {name.rpartition(marker)[2]: tensor for name, tensor in tensors.items() if marker in name}
        pair.paraphraser.load_state_dict(own)
