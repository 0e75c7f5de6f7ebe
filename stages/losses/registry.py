"""The registry of losses by the name that recipes use."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from kdpipe.stages.losses.base import LossConfig
from kdpipe.stages.losses.features.at import ATConfig, ATGradientConfig
from kdpipe.stages.losses.features.fitnet import FitNetConfig
from kdpipe.stages.losses.features.hint import HintConfig
from kdpipe.stages.losses.features.nst import NSTConfig
from kdpipe.stages.losses.features.review_kd import ReviewKDConfig
from kdpipe.stages.losses.features.simkd import SimKDConfig
from kdpipe.stages.losses.features.vid import VIDConfig
from kdpipe.stages.losses.logits.dist import DISTConfig
from kdpipe.stages.losses.logits.dkd import DKDConfig
from kdpipe.stages.losses.logits.kd import KDConfig, LogitMSEConfig
from kdpipe.stages.losses.logits.mlld import MLLDConfig
from kdpipe.stages.losses.logits.nkd import NKDConfig
from kdpipe.stages.losses.relations.cc import CCConfig
from kdpipe.stages.losses.relations.crd import CRDConfig
from kdpipe.stages.losses.relations.pkt import PKTConfig
from kdpipe.stages.losses.relations.rkd import RKDConfig
from kdpipe.stages.losses.relations.sp import SPConfig

AnyLossConfig = Annotated[
    KDConfig
    | DKDConfig
    | DISTConfig
    | NKDConfig
    | MLLDConfig
    | LogitMSEConfig
    | HintConfig
    | FitNetConfig
    | ATConfig
    | ATGradientConfig
    | NSTConfig
    | VIDConfig
    | ReviewKDConfig
    | SimKDConfig
    | RKDConfig
    | SPConfig
    | PKTConfig
    | CCConfig
    | CRDConfig,
    Field(discriminator="loss"),
]

LOSSES: tuple[type[LossConfig], ...] = get_args(get_args(AnyLossConfig)[0])
"""The configurations of all losses, in the order in which `kdpipe losses` lists them."""
