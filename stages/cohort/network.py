"""Build the joint network of a cohort, evaluate its members, and renew what they learn from before each epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.stages.cohort.combine import general_weights
from kdpipe.stages.cohort.config import CohortConfig
from kdpipe.stages.cohort.losses import CohortLosses, members_of
from kdpipe.stages.context import StageContext
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.distillation.task_builder import build_student
from kdpipe.stages.errors import ModelError, RecipeError
from kdpipe.stages.evaluation.evaluate import EvalResult, Evaluation, evaluate_all, predict
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.models.hooks import capture
from kdpipe.stages.models.joint_networks import ENSEMBLE, GATED_BRANCHES, Ensemble, GatedBranches, branch
from kdpipe.stages.numerics import derive_seed
from kdpipe.stages.runtime.distributed import ProcessGroup


@dataclass(frozen=True)
class Cohort:
    """The members of a cohort as networks of their own, untrained, and the joint network that is trained."""

    members: list[ModelBundle]
    joint: ModelBundle

    def trained(self, number: int) -> ModelBundle:
        """Return a member with the weights that it has in the joint network."""
        member, network = self.members[number], self.joint.model
        if isinstance(network, GatedBranches):
            member.model.to(next(network.parameters()).device).load_state_dict(network.member_state(number))
        return member


def member_seed(seed: int, number: int) -> int:
    """Return the seed of a member's initial weights; the first one has those of the student alone."""
    return seed if number == 0 else derive_seed(seed, "member", number)


def build_cohort(config: CohortConfig, student: StudentConfig, seed: int, context: StageContext) -> Cohort:
    """Build the untrained members of a seed, and the network that joins them.

    Raises:
        RecipeError: The members need different input scalings, or change their images.
        ModelError: The network cannot be divided into branches.
    """
    models = config.models(student.model)
    members = [
        build_student(replace(student, model=model), member_seed(seed, number), context)
        for number, model in enumerate(models)
    ]
    normalize = members[0].normalize
    if any(member.normalize != normalize for member in members):
        raise RecipeError(
            "the members of the cohort come with different input scalings, and they get the same images: set "
            "student.mean and student.std."
        )
    _require_different_starts(config, members)
    context = context.resized(student.image_size)
    network: nn.Module
    if config.method == "one":
        copies = [clone_without_hooks(member.model) for member in members]
        at = str(config.branch_at)
        network = branch(copies, at, context.image_shape, seed=derive_seed(seed, "gate"))
        args: dict[str, Any] = {"member": _named(models[0]), "branch_at": at, "count": len(models)}
        record = context.architecture(ModelConfig(name=GATED_BRANCHES, args=args))
    else:
        for number, member in enumerate(members):
            _require_unchanged_images(member.model, number, context.image_shape)
        network = Ensemble([member.model for member in members], context.train_set.in_channels)
        args = {"members": [_named(model) for model in models]}
        record = context.architecture(ModelConfig(name=ENSEMBLE, args=args))
    return Cohort(members, ModelBundle(network, record, normalize))


def _require_different_starts(config: CohortConfig, members: list[ModelBundle]) -> None:
    """Raise RecipeError for two members with the same weights, which would stay equal if they see the same images."""
    weights = [member.identity["weights_sha256"] for member in members]
    again = next((number for number, own in enumerate(weights) if own in weights[:number]), None)
    if again is not None and not config.own_views:
        raise RecipeError(
            f"members {weights.index(weights[again]) + 1} and {again + 1} of the cohort start from the same weights, "
            "and would have nothing to teach each other: leave out the weights, in Python name the network, or use "
            "method = 'kdcl', which gives each its own views."
        )


def _named(model: ModelConfig) -> dict[str, Any]:
    return {"name": model.name, "args": dict(model.args)}


def _require_unchanged_images(model: nn.Module, number: int, image_shape: tuple[int, int, int]) -> None:
    """Raise ModelError for a member that overwrites its input, which the others get, too."""
    images = torch.linspace(-1, 1, 2 * image_shape[0] * image_shape[1] * image_shape[2]).view(2, *image_shape)
    given = images.clone()
    with torch.no_grad():
        model.eval()(given)
    model.train()
    if not torch.equal(given, images):
        raise ModelError(f"member {number + 1} of the cohort overwrites its images in place, which others need, too.")


class SideBySide(nn.Module):
    """A joint network that returns the logits of the ensemble and of each member side by side, [B, (1 + K) C]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        members = members_of(self.network)
        with capture(members) as outputs:
            ensemble = self.network(images)
        return torch.cat([ensemble, *(outputs[member][-1] for member in members)], 1)


@dataclass(frozen=True)
class CohortResult(EvalResult):
    """The result of a cohort's ensemble, and those of its members."""

    members: tuple[EvalResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"members": [member.to_json() for member in self.members]}


def evaluation_of(network: nn.Module) -> Callable[[nn.Module, Evaluation, torch.device], CohortResult]:
    """Return the evaluation of a joint network and its members in one pass over the images."""
    side_by_side, count = SideBySide(network), 1 + len(members_of(network))

    def evaluate(model: nn.Module, test: Evaluation, device: torch.device) -> CohortResult:
        first, *members = evaluate_all(side_by_side, test, device, count)
        return CohortResult(first.value, first.loss, first.metric, first.task, tuple(members))

    return evaluate


def renewal(
    network: nn.Module, exchange: CohortLosses, validation: Evaluation | None, process_group: ProcessGroup
) -> Callable[[nn.Module, int], None]:
    """Return what is called before each epoch: it renews KDCL's weights, or the peers of codistillation.

    A training that is resumed within an epoch has what it was renewed with in its checkpoint.
    """

    def renew(model: nn.Module, epoch: int) -> None:
        if not exchange.is_renewed or int(exchange.renewed_in) == epoch:
            return
        exchange.renewed_in.fill_(epoch)
        if exchange.config.method == "codistillation":
            for peer, member in zip(exchange.peers, members_of(network), strict=True):
                peer.load_state_dict(member.state_dict())
            return
        assert validation is not None
        found = process_group.on_main(lambda: _held_out_weights(network, validation).tolist())
        exchange.weights.copy_(torch.tensor(found))

    return renew


def _held_out_weights(network: nn.Module, validation: Evaluation) -> Tensor:
    """Return the weights of KDCL's "general" on the validation images, float64 [K]."""
    count, parts, labels = len(members_of(network)), list[Tensor](), list[Tensor]()
    for predictions in predict(SideBySide(network), validation, validation.device):
        some = predictions.labeled
        parts.append(torch.stack(some.logits.chunk(1 + count, 1)[1:]).double().softmax(2).cpu())
        labels.append(some.labels.cpu())
    return general_weights(torch.cat(parts, 1), torch.cat(labels))
