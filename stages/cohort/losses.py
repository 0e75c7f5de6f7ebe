"""The losses of a cohort: what each member learns from the others, and from stores. No gradient reaches a teacher.

DML: Zhang, Xiang, Hospedales, Lu 2018, "Deep Mutual Learning", CVPR (arXiv 1706.00384). Its members are updated at once
here, where the paper updates one after the other.

With CE_i the cross entropy of member i, T the temperature, w the weight, and KL(p || q) = sum p log(p / q):

    dml             CE_i + w T^2 / (K - 1) sum_{j != i} KL(p_j || p_i)
    kdcl            CE_i + w T^2 KL(softmax(z / T) || p_i), z the combined logits of all members
    one             CE_i + w w(t) T^2 KL(e || p_i), and once the cross entropy of the gated ensemble e
    codistillation  CE_i + w T^2 KL(mean_{j != i} p_j of the last epoch's end || p_i), from the second epoch on
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdpipe.stages.cohort.combine import average, combine
from kdpipe.stages.cohort.config import RAMP_SHARE, CohortConfig
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.distillation import Distillation, own_features
from kdpipe.stages.losses.inputs import DatasetInfo, Shapes
from kdpipe.stages.losses.logits.kd import KD
from kdpipe.stages.losses.schedules import TrainProgress, value_at
from kdpipe.stages.losses.weighted import WeightedLoss
from kdpipe.stages.models.clone import clone_without_hooks
from kdpipe.stages.targets.ensemble import TeacherEnsemble, TeachersConfig
from kdpipe.stages.targets.feature_spec import FeatureSpec

PEERS = "peers"


@dataclass(frozen=True)
class PeerLoss:
    """A loss by which one member learns from another.

    Attributes:
        features: What is computed of the other's layers, by what the loss asks for.
    """

    name: str
    member: int
    peer: int
    features: Mapping[FeatureSpec, FeatureSpec]

    @property
    def key(self) -> str:
        """Its name among the losses of a cohort."""
        return f"{self.name}_{self.member}_{self.peer}"


class CohortLosses(Distillation):
    """All losses of a cohort, with what they train or keep: adapters, KDCL's weights, the peers of codistillation.

    Attributes:
        config: The recipe's `cohort` section.
        between: The further losses between members.
        stored: For each member the losses from stores; none without a teacher.
    """

    renewed_in: Tensor
    weights: Tensor

    def __init__(
        self,
        config: CohortConfig,
        between: Sequence[tuple[PeerLoss, WeightedLoss]],
        stored: Sequence[Distillation],
    ) -> None:
        kd = KD(temperature=config.softened, weight=config.weight)
        losses = {PEERS: WeightedLoss(PEERS, kd, kd.build({}, {}, DatasetInfo(0, 0)))}
        losses |= {one.key: loss for one, loss in between}
        for number, own in enumerate(stored):
            for name, loss in own.losses.items():
                assert isinstance(loss, WeightedLoss)
                loss.name = stored_name(name, number)
                losses[loss.name] = loss
        super().__init__(losses, TeacherEnsemble(TeachersConfig(), 1))
        self.config, self.between, self.stored = config, [one for one, _ in between], tuple(stored)
        self.ensembles = nn.ModuleList([own.ensemble for own in stored])
        self.peers = nn.ModuleList()
        # The epoch of the last renewal, and KDCL's weights: None where nothing is renewed.
        self.register_buffer("renewed_in", torch.tensor(0) if self.is_renewed else None)
        equal = torch.full((config.num_members,), 1 / config.num_members, dtype=torch.float64)
        self.register_buffer("weights", equal if self.is_renewed else None)

    @property
    def is_renewed(self) -> bool:
        """Whether something is renewed before each epoch: KDCL's weights, or the peers of codistillation."""
        return self.config.method == "codistillation" or self.config.combine == "general"

    def set_peers(self, members: Sequence[nn.Module]) -> None:
        """Keep frozen copies of the members, the peers of codistillation."""
        self.peers = nn.ModuleList(clone_without_hooks(member).requires_grad_(False) for member in members)
        self.peers.eval()

    def train(self, mode: bool = True) -> CohortLosses:
        super().train(mode)
        self.peers.eval()
        return self

    def factor(self, progress: TrainProgress) -> float:
        """Return the factor of what the members teach each other in this epoch."""
        if self.config.method == "one":
            return ramp(progress.epoch, self.config.ramp_epochs or RAMP_SHARE * progress.epochs)
        return float(self.config.method != "codistillation" or progress.epoch >= 1)  # peers have to be trained first

    def targets(
        self,
        logits: Sequence[Tensor],
        ensemble: Tensor,
        images: Sequence[Tensor],
        labels: Tensor,
        progress: TrainProgress,
    ) -> list[list[Tensor]]:
        """Return for each member the logits [B, C] that it learns from, without gradient.

        Args:
            logits: Those of the members, [B, C].
            ensemble: Those of the joint network.
            images: The images of each member.
            labels: int64 [B].
            progress: The epoch, on which the temperature may depend.
        """
        count, method = len(logits), self.config.method
        logits = [one.detach() for one in logits]
        if method == "one":
            return [[ensemble.detach()]] * count
        if method == "kdcl":
            return [[combine(self.config.combines, torch.stack(logits), labels, self.weights)]] * count
        if method == "codistillation":
            with torch.no_grad():
                found = [peer(own).float() for peer, own in zip(self.peers, images, strict=True)]
            temperature = value_at(self.config.softened, progress)
            others = [torch.stack([one for n, one in enumerate(found) if n != number]) for number in range(count)]
            return [[average(each, temperature)] for each in others]
        return [[one for n, one in enumerate(logits) if n != number] for number in range(count)]


def stored_name(name: str, member: int) -> str:
    """Return the name of a member's loss from the stores among those of a cohort."""
    return f"{name}_stored_{member}"


def ramp(epoch: float, length: float) -> float:
    """Return ONE's weight w(t) = exp(-5 (1 - t / length)^2) in epoch t, from 0; 1 from epoch `length` on."""
    return 1.0 if epoch >= length else math.exp(-5 * (1 - epoch / length) ** 2)


def build_peer_losses(
    configs: Sequence[Loss], shapes: Sequence[Shapes], dataset: DatasetInfo, seed: int
) -> list[tuple[PeerLoss, WeightedLoss]]:
    """Build the further losses of each member from each other one, with adapters initialized from `seed`.

    Args:
        configs: The losses.
        shapes: For each member, the shapes of its features that the losses use.
        dataset: The sizes of the data set.
        seed: Initializes the adapters.

    Raises:
        RecipeError: The shapes of two members do not match.
    """
    losses = []
    members = range(len(shapes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, config in enumerate(configs):
            config.require_classes(dataset.num_classes)
            name = f"{config.loss.rpartition(':')[2].replace('.', '_')}_{number}"
            for member, peer in ((i, j) for i in members for j in members if i != j):
                computed, teacher = own_features(config, shapes[member], shapes[peer])
                module = config.build(shapes[member], teacher, dataset)
                own = PeerLoss(name, member, peer, computed)
                losses.append((own, WeightedLoss(own.key, config, module)))
    return losses


def members_of(network: nn.Module) -> list[nn.Module]:
    """Return the members of a joint network."""
    assert isinstance(network.members, nn.ModuleList)
    return list(network.members)
