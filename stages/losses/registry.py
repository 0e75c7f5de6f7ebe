"""The registry of losses by the name that recipes use."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.features.at import AT, ATGradient
from kdpipe.stages.losses.features.fitnet import FitNet
from kdpipe.stages.losses.features.hint import Hint
from kdpipe.stages.losses.features.nst import NST
from kdpipe.stages.losses.features.review_kd import ReviewKD
from kdpipe.stages.losses.features.simkd import SimKD
from kdpipe.stages.losses.features.vid import VID
from kdpipe.stages.losses.logits.dist import DIST
from kdpipe.stages.losses.logits.dkd import DKD
from kdpipe.stages.losses.logits.kd import KD, LogitMSE
from kdpipe.stages.losses.logits.mlld import MLLD
from kdpipe.stages.losses.logits.nkd import NKD
from kdpipe.stages.losses.relations.cc import CC
from kdpipe.stages.losses.relations.crd import CRD
from kdpipe.stages.losses.relations.pkt import PKT
from kdpipe.stages.losses.relations.rkd import RKD
from kdpipe.stages.losses.relations.sp import SP

AnyLoss = Annotated[
    KD
    | DKD
    | DIST
    | NKD
    | MLLD
    | LogitMSE
    | Hint
    | FitNet
    | AT
    | ATGradient
    | NST
    | VID
    | ReviewKD
    | SimKD
    | RKD
    | SP
    | PKT
    | CC
    | CRD,
    Field(discriminator="loss"),
]

LOSSES: tuple[type[Loss], ...] = get_args(get_args(AnyLoss)[0])
"""The configurations of all losses, in the order in which `kdpipe losses` lists them."""
