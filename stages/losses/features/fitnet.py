"""Hints in stages of their own, before the student's training: FitNets as in the paper.

Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", ICLR (arXiv 1412.6550), section 3.1 and algorithm 1. Stage one
trains the student up to its hint layer, with the adapter, on the hint alone. Stage two trains the whole student on
labels and the other losses, from there. `hint` trains everything at once, as RepDistiller does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from kdpipe.stages.config import max_value, section
from kdpipe.stages.losses.base import FeatureLoss
from kdpipe.stages.losses.features.hint import HintModule
from kdpipe.stages.losses.shapes import Pair
from kdpipe.stages.targets.feature_spec import FeatureSpec, Shape


@section
class InitialLoss(FeatureLoss):
    """Configuration of a loss that trains the student alone, up to its layers, before the student's own training.

    It adds nothing to the training that follows. The default of 30 epochs is that of RepDistiller.

    Attributes:
        layers: pairs of (student layer, teacher layer), from shallow to deep.
        stage_epochs: epochs in addition to those of the training that follows.
        weight: factor of the loss in these epochs.
    """

    stage_epochs: Annotated[int, Field(ge=1), max_value(10**6)] = 30

    def stages(self) -> tuple[InitialLoss, ...]:
        """Return the configuration of each stage, in training order."""
        return (self,)


@section
class FitNet(InitialLoss):
    """Mean squared error at each pair of layers alone, one pair after another, before the student's own training.

    It adds nothing to the training that follows. The default of 30 epochs is that of RepDistiller.

    Attributes:
        layers: pairs of (student layer, teacher layer), each trained alone in the given order; several pairs, from
            shallow to deep, are layer-wise training.
        stage_epochs: epochs per pair, in addition to those of the training that follows.
        weight: factor of the error in these epochs.
    """

    paper: ClassVar[str] = "Romero et al. 2015, arXiv 1412.6550"

    loss: Literal["fitnet"] = "fitnet"

    def build_pair(self, pair: Pair, feature: FeatureSpec, student: Shape, teacher: Shape) -> nn.Module:
        return HintModule(student, teacher)

    def stages(self) -> tuple[FitNet, ...]:
        return tuple(replace(self, layers=(pair,)) for pair in self.layers)
