"""Distillation losses: one class each, for recipes, for `kdpipe.train_student` and for a loop of your own.

A loss is called with the outputs of student and teacher, and returns the scalar that training would add for them:

    loss = KD(temperature=4.0)(student_logits, teacher_logits)
    loss = AT([("stage2", "stage2")])(ModelOutput(logits, features), {"stage2": teacher_maps})

Losses with parameters of their own, such as the adapter of `Hint`, are built first with `module`. Pure functions are
in `kdpipe.losses.functional`. Names are imported on first use, so that this costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdpipe.losses import functional
    from kdpipe.stages.losses.base import FeatureLoss, LogitLoss, Loss, MapLoss, PooledLoss, SoftLogitLoss
    from kdpipe.stages.losses.features.ab import AB
    from kdpipe.stages.losses.features.cosine import Cosine
    from kdpipe.stages.losses.features.fitnet import FitNet
    from kdpipe.stages.losses.features.ft import FT
    from kdpipe.stages.losses.features.hint import Hint
    from kdpipe.stages.losses.features.ofd import OFD
    from kdpipe.stages.losses.features.pefd import PEFD
    from kdpipe.stages.losses.features.review_kd import ReviewKD
    from kdpipe.stages.losses.features.simkd import SimKD
    from kdpipe.stages.losses.features.srd import SRD
    from kdpipe.stages.losses.features.srrl import SRRL
    from kdpipe.stages.losses.features.vid import VID
    from kdpipe.stages.losses.features.vkd import VkD
    from kdpipe.stages.losses.inputs import LossInputs, Negatives
    from kdpipe.stages.losses.logits.binary_kd import BinaryKD
    from kdpipe.stages.losses.logits.dist import DIST
    from kdpipe.stages.losses.logits.dkd import DKD
    from kdpipe.stages.losses.logits.gkl import GKL
    from kdpipe.stages.losses.logits.hard_distillation import HardDistillation
    from kdpipe.stages.losses.logits.kd import KD, LogitMSE
    from kdpipe.stages.losses.logits.mlld import MLLD
    from kdpipe.stages.losses.logits.nkd import NKD
    from kdpipe.stages.losses.logits.ttm import TTM, WTTM
    from kdpipe.stages.losses.logits.wkd import WKDL
    from kdpipe.stages.losses.logits.wsld import WSLD
    from kdpipe.stages.losses.relations.cc import CC
    from kdpipe.stages.losses.relations.crd import CRD
    from kdpipe.stages.losses.relations.pkt import PKT
    from kdpipe.stages.losses.relations.relation import RelationLoss
    from kdpipe.stages.losses.relations.rkd import RKD
    from kdpipe.stages.losses.relations.sp import SP
    from kdpipe.stages.losses.sample_selection import SampleSelection
    from kdpipe.stages.losses.schedules import Schedule, Scheduled, TrainProgress
    from kdpipe.stages.losses.statistics.at import AT, ATGradient
    from kdpipe.stages.losses.statistics.cat_kd import CATKD
    from kdpipe.stages.losses.statistics.cwd import CWD
    from kdpipe.stages.losses.statistics.fsp import FSP
    from kdpipe.stages.losses.statistics.kdsvd import KDSVD
    from kdpipe.stages.losses.statistics.nst import NST
    from kdpipe.stages.losses.statistics.wkd import WKDF
    from kdpipe.stages.models.hooks import ModelOutput
    from kdpipe.stages.runtime.collectives import all_gather_with_grad
    from kdpipe.stages.targets.feature_spec import FeatureSpec

_MODULES = {
    "losses.base": "FeatureLoss LogitLoss Loss MapLoss PooledLoss SoftLogitLoss",
    "losses.features.ab": "AB",
    "losses.statistics.at": "AT ATGradient",
    "losses.statistics.cat_kd": "CATKD",
    "losses.features.cosine": "Cosine",
    "losses.statistics.cwd": "CWD",
    "losses.features.fitnet": "FitNet",
    "losses.statistics.fsp": "FSP",
    "losses.features.ft": "FT",
    "losses.features.hint": "Hint",
    "losses.statistics.kdsvd": "KDSVD",
    "losses.statistics.nst": "NST",
    "losses.features.ofd": "OFD",
    "losses.features.pefd": "PEFD",
    "losses.features.review_kd": "ReviewKD",
    "losses.features.simkd": "SimKD",
    "losses.features.srd": "SRD",
    "losses.features.srrl": "SRRL",
    "losses.features.vid": "VID",
    "losses.features.vkd": "VkD",
    "losses.statistics.wkd": "WKDF",
    "losses.inputs": "LossInputs Negatives",
    "losses.logits.binary_kd": "BinaryKD",
    "losses.logits.dist": "DIST",
    "losses.logits.dkd": "DKD",
    "losses.logits.gkl": "GKL",
    "losses.logits.hard_distillation": "HardDistillation",
    "losses.logits.kd": "KD LogitMSE",
    "losses.logits.mlld": "MLLD",
    "losses.logits.nkd": "NKD",
    "losses.logits.ttm": "TTM WTTM",
    "losses.logits.wkd": "WKDL",
    "losses.logits.wsld": "WSLD",
    "losses.relations.cc": "CC",
    "losses.relations.crd": "CRD",
    "losses.relations.pkt": "PKT",
    "losses.relations.relation": "RelationLoss",
    "losses.relations.rkd": "RKD",
    "losses.relations.sp": "SP",
    "losses.sample_selection": "SampleSelection",
    "losses.schedules": "Schedule Scheduled TrainProgress",
    "models.hooks": "ModelOutput",
    "runtime.collectives": "all_gather_with_grad",
    "targets.feature_spec": "FeatureSpec",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

# fmt: off
__all__ = [  # literal, so that linters and type checkers see it; a test compares it with _MODULES
    "AB", "AT", "CATKD", "CC", "CRD", "CWD", "DIST", "DKD", "FSP", "FT", "GKL", "KD", "KDSVD", "MLLD", "NKD", "NST",
    "OFD", "PEFD", "PKT", "RKD", "SP", "SRD", "SRRL", "TTM", "VID", "WKDF", "WKDL", "WSLD", "WTTM", "ATGradient",
    "BinaryKD", "Cosine", "FeatureLoss", "FeatureSpec", "FitNet", "HardDistillation", "Hint", "LogitLoss", "LogitMSE",
    "Loss", "LossInputs", "MapLoss", "ModelOutput", "Negatives", "PooledLoss", "RelationLoss", "ReviewKD",
    "SampleSelection", "Schedule", "Scheduled", "SimKD", "SoftLogitLoss", "TrainProgress", "VkD",
    "all_gather_with_grad", "functional",
]
# fmt: on

if not TYPE_CHECKING:  # mypy uses the imports above and reports unknown names

    def __getattr__(name: str) -> Any:
        if name == "functional":
            return import_module(f"{__name__}.functional")
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"kdpipe.stages.{_MODULE_OF[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
