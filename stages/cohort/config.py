"""The recipe's `cohort` section: students that teach each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from kdpipe.stages.cohort.combine import Combine
from kdpipe.stages.config import Count, PathStr, section
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import FeatureLoss, Loss
from kdpipe.stages.losses.features.fitnet import InitialLoss
from kdpipe.stages.losses.features.ft import FT
from kdpipe.stages.losses.features.simkd import SimKD
from kdpipe.stages.losses.registry import AnyLoss
from kdpipe.stages.losses.schedules import Scheduled, Temperature
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.joint_networks import MAX_MEMBERS
from kdpipe.stages.views.config import Views

TEMPERATURES = {"dml": 1.0, "kdcl": 2.0, "one": 3.0, "codistillation": 1.0}
"""The temperatures of the papers."""

RAMP_SHARE = 80 / 300
"""The share of its epochs over which ONE's paper raises the weight of its distillation."""


@section
class CohortMember:
    """One member of a cohort: its network."""

    model: ModelConfig


@section
class CohortConfig:
    """Configuration of students that teach each other while they train, all as `student.train` says.

    Attributes:
        method: "dml" (each learns from each of the others), "kdcl" (from a combination of all; every member sees its
            own view), "one" (branches on one trunk learn from their gated ensemble), or "codistillation" (from the
            others' weights at the end of the last epoch).
        members: The number of copies of `student.model`, which differ by their seeds, or a list of members, each with
            its `model`.
        combine: How KDCL combines the members' logits: "naive" takes those with the least cross entropy, "linear" the
            best convex mixture of each sample, "min_logit" the least of each class, "general" weights by the errors
            on the validation images.
        temperature: T of both softmaxes; by default that of the paper: dml 1, kdcl 2, one 3, codistillation 1.
        weight: Factor of what the members teach each other.
        distill: Further losses by which each member learns from each of the others: entries as of `distill`, in whose
            pairs of layers the second is the other member's.
        with_teacher: Whether each member learns from the stores, too, by the losses of `distill`.
        branch_at: The first module that each branch of "one" has of its own; all before it is shared.
        ramp_epochs: The epochs over which the weight of "one" rises to its full value; by default 80/300 of all.
        keep: The result that becomes a teacher or is compressed: the "best" member, or the "ensemble".
    """

    method: Literal["dml", "kdcl", "one", "codistillation"] = "dml"
    members: (
        Annotated[int, Field(ge=2, le=MAX_MEMBERS)]
        | Annotated[tuple[CohortMember, ...], Field(min_length=2, max_length=MAX_MEMBERS)]
    ) = 2
    combine: Combine | None = None
    temperature: Temperature | None = None
    weight: Scheduled = 1.0
    distill: tuple[AnyLoss, ...] = ()
    with_teacher: bool = False
    branch_at: PathStr | None = None
    ramp_epochs: Count | None = None
    keep: Literal["best", "ensemble"] = "best"

    def __post_init__(self) -> None:
        for key, method in (("combine", "kdcl"), ("branch_at", "one"), ("ramp_epochs", "one")):
            if getattr(self, key) is not None and self.method != method:
                raise ValueError(f"{key} belongs to method = {method!r}, and it is {self.method!r}: leave it out")
        if self.method == "one" and self.branch_at is None:
            raise ValueError("method = 'one' needs branch_at, the first module that each branch has of its own")
        if self.method == "one" and not isinstance(self.members, int):
            raise ValueError("the branches of method = 'one' are of one network: give their number as members")

    @property
    def num_members(self) -> int:
        return self.members if isinstance(self.members, int) else len(self.members)

    @property
    def own_views(self) -> bool:
        """Whether each member sees a view of its own."""
        return self.method == "kdcl"

    @property
    def combines(self) -> Combine:
        """How the members' logits are combined."""
        return self.combine or "min_logit"

    @property
    def softened(self) -> Temperature:
        """The temperature, by default that of the paper."""
        return TEMPERATURES[self.method] if self.temperature is None else self.temperature

    def models(self, student: ModelConfig) -> list[ModelConfig]:
        """Return the network of each member."""
        if isinstance(self.members, int):
            return [student] * self.members
        return [member.model for member in self.members]

    def to_json(self) -> dict[str, Any]:
        """Return what decides the weights, beside the networks and losses."""
        own: dict[str, Any] = {"method": self.method, "with_teacher": self.with_teacher}
        own |= {"combine": self.combines} if self.method == "kdcl" else {}
        own |= {"branch_at": self.branch_at, "ramp_epochs": self.ramp_epochs} if self.method == "one" else {}
        return own


def require_one_kind(views: Views) -> None:
    """Raise RecipeError for several kinds of views, which the members of a cohort cannot be shown."""
    if views.kinds:
        raise RecipeError(
            "a cohort's step shows one view of each image, and views.kinds has several kinds: set views.operations in "
            "its place, or train the students by themselves."
        )


def check_peer_losses(losses: Sequence[Loss], config: CohortConfig) -> None:
    """Raise RecipeError for losses between members that cannot be computed there."""
    for number, loss in enumerate(losses):
        entry = f"cohort.distill.{number} ({loss.loss})"
        if config.own_views:
            raise RecipeError(
                f"{entry}: the members of method = 'kdcl' see different views, so that their features are not "
                "comparable: remove it, or use another method."
            )
        if config.method == "one" and loss.student_layers():
            raise RecipeError(f"{entry}: the branches of method = 'one' learn from logits alone: remove this loss.")
        if loss.store is not None:
            raise RecipeError(f"{entry}: it learns from the other members, not from a store: remove store.")
        _require_possible(loss, entry)
        if loss.num_negatives:
            raise RecipeError(f"{entry}: it needs stored features of other samples: use it in distill, with_teacher.")


def check_teacher_losses(losses: Sequence[Loss], config: CohortConfig) -> None:
    """Raise RecipeError for losses from the stores that the members of a cohort cannot have."""
    for number, loss in enumerate(losses):
        entry = f"distill.{number} ({loss.loss})"
        _require_possible(loss, f"{entry}, with cohort.with_teacher = true")
        if config.method == "one" and (isinstance(loss, FeatureLoss) or loss.student_layers()):
            raise RecipeError(
                f"{entry}: the branches of method = 'one' learn from logits alone: remove this loss, or set "
                "cohort.with_teacher = false."
            )


def _require_possible(loss: Loss, entry: str) -> None:
    if isinstance(loss, InitialLoss | FT | SimKD) or loss.input_gradient:
        raise RecipeError(
            f"{entry}: it trains a student in stages, changes its network or needs the gradient by its images, which "
            "is for single students: use another loss, such as hint or at."
        )
    if loss.needs_head:
        raise RecipeError(f"{entry}: it needs a teacher's last layer, which is for single students: use another loss.")
