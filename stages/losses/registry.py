"""The registry of losses by the name that recipes use: built-in, registered, and those of `python:` references."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, TypeVar, dataclass_transform, overload

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationInfo
from pydantic_core import CoreSchema, PydanticCustomError, SchemaValidator, core_schema

from kdpipe.stages.config import section
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import Loss
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
from kdpipe.stages.losses.relations.rkd import RKD
from kdpipe.stages.losses.relations.sp import SP
from kdpipe.stages.losses.statistics.at import AT, ATGradient
from kdpipe.stages.losses.statistics.cat_kd import CATKD
from kdpipe.stages.losses.statistics.cwd import CWD
from kdpipe.stages.losses.statistics.fsp import FSP
from kdpipe.stages.losses.statistics.kdsvd import KDSVD
from kdpipe.stages.losses.statistics.nst import NST
from kdpipe.stages.losses.statistics.wkd import WKDF
from kdpipe.stages.losses.user_loss import as_loss
from kdpipe.stages.plugins.registry import Registry
from kdpipe.stages.plugins.user_code import is_user_reference

L = TypeVar("L", bound=type[Loss])

# In the order in which `kdpipe losses` lists them.
_BUILTIN: tuple[type[Loss], ...] = (
    *(KD, DKD, DIST, NKD, TTM, WTTM, WSLD, WKDL, MLLD, GKL, HardDistillation, LogitMSE, BinaryKD),
    *(Hint, Cosine, PEFD, SRD, SRRL, VkD, FitNet, AB, FSP, FT, AT, ATGradient, OFD, CATKD, CWD),
    *(WKDF, NST, KDSVD, VID, ReviewKD, SimKD),
    *(RKD, SP, PKT, CC, CRD),
)

LOSSES: Registry[type[Loss]] = Registry("loss", "distill.loss", {kind.loss: kind for kind in _BUILTIN})

WITHOUT_CODE = {"user_code": False}
"""Validation context that reads entries of losses that are not built in as `UnknownLoss`, and imports nothing."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
@overload
def register_loss(name: L) -> L: ...
@overload
def register_loss(name: Callable[..., object]) -> Callable[..., Loss]: ...
@overload
def register_loss(name: str | None = None, *, per_sample: bool | None = None) -> Callable[[Any], Any]: ...
def register_loss(name: Any = None, *, per_sample: bool | None = None) -> Any:
    """Return a decorator that makes a class or function a loss, which recipes name by `loss = "NAME"`.

    What it makes is a class of settings like `kdpipe.losses.KD`, to be used in `kdpipe.train_student` or alone.

    Args:
        name: The name in recipes; by default that of the class or function.
        per_sample: Whether a function or module returns [B], and not one value for the batch: found by trying it.

    Raises:
        RecipeError: The name is taken or invalid, or it is no loss; see `as_loss`.

    Example:
        >>> @register_loss
        ... def logit_mae(student_logits, teacher_logits, *, margin: float = 0.0):
        ...     return ((student_logits - teacher_logits).abs() - margin).relu().mean(1)
        >>> logit_mae(margin=0.5)(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(0.7500)
    """
    if name is not None and not isinstance(name, str):
        return register_loss()(name)

    def decorate(found: Any) -> type[Loss]:
        own = name or str(getattr(found, "__name__", found))
        loss = as_loss(found, own, per_sample)
        LOSSES.add(own, loss)
        return loss

    return decorate


def loss_class(name: str) -> type[Loss]:
    """Return the class of the loss with this name, or that a `python:` reference names.

    Raises:
        RecipeError: There is none, or it is not a loss.
    """
    found: Any = LOSSES.get(name)
    return as_loss(found, name) if is_user_reference(name) else found


@section
class UnknownLoss(Loss):
    """A loss that is not built in, read from a record without importing its code.

    Attributes:
        settings: its own keys.
    """

    settings: dict[str, Any]


class _Entry:
    """The type of an entry: that of any loss that exists when the entry is read."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(_read_entry)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(_tagged({name: loss_class(name) for name in LOSSES.names()}))


AnyLoss = Annotated[Loss, _Entry()]
"""A `[[distill]]` entry; its key `loss` decides the class."""


def _read_entry(value: Any, info: ValidationInfo) -> Loss:
    if isinstance(value, Loss):
        return value
    name = value.get("loss") if isinstance(value, dict) else None
    if not isinstance(name, str) or not (name in LOSSES.builtin or is_user_reference(name) or _may_know(name, info)):
        return _validator(KD).validate_json(json.dumps(value))  # type: ignore[no-any-return]  # raises
    if info.context == WITHOUT_CODE and name not in LOSSES.builtin:
        common = {key: own for key, own in value.items() if key in Loss.__dataclass_fields__}
        settings = {key: own for key, own in value.items() if key not in common}
        text = json.dumps({**common, "settings": settings})
        return TypeAdapter(UnknownLoss).validate_json(text)
    try:
        kind: Any = loss_class(name)
    except RecipeError as error:
        raise PydanticCustomError("loss_reference", "{text}", {"text": str(error)}) from error
    return _validator(kind).validate_json(json.dumps(value))  # type: ignore[no-any-return]


def _may_know(name: str, info: ValidationInfo) -> bool:
    return info.context == WITHOUT_CODE or name in LOSSES.registered()


@cache
def _validator(kind: type[Loss]) -> SchemaValidator:
    return SchemaValidator(_tagged({kind.loss: kind}))


def _tagged(kinds: dict[str, type[Loss]]) -> CoreSchema:
    """Return the schema of a table whose key `loss` is one of these names, and part of the location of errors."""
    choices = {name: TypeAdapter(kind).core_schema for name, kind in kinds.items()}
    return core_schema.tagged_union_schema(choices, discriminator="loss")
