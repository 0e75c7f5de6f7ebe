"""Distillation losses as pure functions of tensors, without weights, keys and state.

Names are imported on first use, so that this costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdpipe.stages.losses.features.ab import ab_loss
    from kdpipe.stages.losses.features.cosine import cosine_loss
    from kdpipe.stages.losses.features.ft import ft_loss
    from kdpipe.stages.losses.features.hint import hint_loss
    from kdpipe.stages.losses.features.ofd import ofd_loss
    from kdpipe.stages.losses.features.review_kd import hcl_loss
    from kdpipe.stages.losses.features.srd import srd_loss
    from kdpipe.stages.losses.features.srrl import srrl_loss
    from kdpipe.stages.losses.features.vid import vid_loss
    from kdpipe.stages.losses.features.vkd import vkd_loss
    from kdpipe.stages.losses.logits.binary_kd import binary_kd_loss
    from kdpipe.stages.losses.logits.dist import dist_loss
    from kdpipe.stages.losses.logits.dkd import dkd_loss, nckd_loss, tckd_loss
    from kdpipe.stages.losses.logits.gkl import gkl_loss
    from kdpipe.stages.losses.logits.hard_distillation import hard_distillation_loss
    from kdpipe.stages.losses.logits.kd import kd_loss, logit_mse_loss
    from kdpipe.stages.losses.logits.mlld import mlld_loss
    from kdpipe.stages.losses.logits.nkd import nkd_loss
    from kdpipe.stages.losses.logits.ttm import ttm_loss, wttm_loss
    from kdpipe.stages.losses.logits.wkd import class_costs, wkd_l_loss
    from kdpipe.stages.losses.logits.wsld import wsld_loss
    from kdpipe.stages.losses.relations.cc import cc_loss, correlation_loss
    from kdpipe.stages.losses.relations.nce import nce_loss
    from kdpipe.stages.losses.relations.pkt import pkt_loss
    from kdpipe.stages.losses.relations.rkd import angle_loss, distance_loss, rkd_loss
    from kdpipe.stages.losses.relations.sp import sp_loss
    from kdpipe.stages.losses.statistics.at import at_loss
    from kdpipe.stages.losses.statistics.cat_kd import cat_kd_loss
    from kdpipe.stages.losses.statistics.cwd import cwd_loss
    from kdpipe.stages.losses.statistics.fsp import fsp_loss
    from kdpipe.stages.losses.statistics.kdsvd import kdsvd_loss
    from kdpipe.stages.losses.statistics.nst import nst_loss
    from kdpipe.stages.losses.statistics.wkd import wkd_f_loss
    from kdpipe.stages.losses.weighted import standardize_logits

_MODULES = {
    "features.ab": "ab_loss",
    "features.cosine": "cosine_loss",
    "features.ft": "ft_loss",
    "features.hint": "hint_loss",
    "features.ofd": "ofd_loss",
    "features.review_kd": "hcl_loss",
    "features.srd": "srd_loss",
    "features.srrl": "srrl_loss",
    "features.vid": "vid_loss",
    "features.vkd": "vkd_loss",
    "logits.binary_kd": "binary_kd_loss",
    "logits.dist": "dist_loss",
    "logits.dkd": "dkd_loss nckd_loss tckd_loss",
    "logits.gkl": "gkl_loss",
    "logits.hard_distillation": "hard_distillation_loss",
    "logits.kd": "kd_loss logit_mse_loss",
    "logits.mlld": "mlld_loss",
    "logits.nkd": "nkd_loss",
    "logits.ttm": "ttm_loss wttm_loss",
    "logits.wkd": "class_costs wkd_l_loss",
    "logits.wsld": "wsld_loss",
    "relations.cc": "cc_loss correlation_loss",
    "relations.nce": "nce_loss",
    "relations.pkt": "pkt_loss",
    "relations.rkd": "angle_loss distance_loss rkd_loss",
    "relations.sp": "sp_loss",
    "statistics.at": "at_loss",
    "statistics.cat_kd": "cat_kd_loss",
    "statistics.cwd": "cwd_loss",
    "statistics.fsp": "fsp_loss",
    "statistics.kdsvd": "kdsvd_loss",
    "statistics.nst": "nst_loss",
    "statistics.wkd": "wkd_f_loss",
    "weighted": "standardize_logits",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

# fmt: off
__all__ = [  # literal, so that linters and type checkers see it; a test compares it with _MODULES
    "ab_loss",
    "angle_loss",
    "at_loss",
    "binary_kd_loss",
    "cat_kd_loss",
    "cc_loss",
    "class_costs",
    "correlation_loss",
    "cosine_loss",
    "cwd_loss",
    "dist_loss",
    "distance_loss",
    "dkd_loss",
    "fsp_loss",
    "ft_loss",
    "gkl_loss",
    "hard_distillation_loss",
    "hcl_loss",
    "hint_loss",
    "kd_loss",
    "kdsvd_loss",
    "logit_mse_loss",
    "mlld_loss",
    "nce_loss",
    "nckd_loss",
    "nkd_loss",
    "nst_loss",
    "ofd_loss",
    "pkt_loss",
    "rkd_loss",
    "sp_loss",
    "srd_loss",
    "srrl_loss",
    "standardize_logits",
    "tckd_loss",
    "ttm_loss",
    "vid_loss",
    "vkd_loss",
    "wkd_f_loss",
    "wkd_l_loss",
    "wsld_loss",
    "wttm_loss",
]
# fmt: on

if not TYPE_CHECKING:  # mypy uses the imports above and reports unknown names

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"kdpipe.stages.losses.{_MODULE_OF[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
