"""What a network is taught from: images in their views, hard labels, and, for a student, what stores say about them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.errors import RunError
from stages.features import Outputs, TeacherOutputs
from stages.order import batch_indices, epoch_order, num_steps, slab_order
from stages.pictures import Pictures, Request, Seen
from stages.targets import Targets


@dataclass(frozen=True)
class Normalisation:
    """A model's own scaling of its input: (pixel / 255 - mean) / std for each channel. Views come before it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to float32 [B, C, H, W]."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)

    def to_json(self) -> dict[str, list[float]]:
        return {"mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Normalisation:
        """The scaling in the record that is kept with a network's weights. Raises RunError where there is none."""
        try:
            held = record["normalisation"]
            return Normalisation(tuple(map(float, held["mean"])), tuple(map(float, held["std"])))
        except (KeyError, TypeError, ValueError) as error:
            raise RunError("a network's weights lack the record of how it scales its input: train it again.") from error


@dataclass(frozen=True)
class Batch:
    """Images float32 [B, C, H, W], normalised; labels int64 [B]; what each store holds for those with targets.

    Where samples are mixed: the labels of their partners, int64 [B], and the share of their own, float32 [B].
    has_targets: bool [B] on the CPU, where the stores lack some samples; None where they hold all.
    """

    images: Tensor
    labels: Tensor
    teachers: Sequence[TeacherOutputs] = ()
    partner_labels: Tensor | None = None
    own_share: Tensor | None = None
    has_targets: Tensor | None = None


@dataclass(frozen=True)
class Lesson:
    """The pictures of a data set in their views, and the targets that go with them.

    fresh_views: every epoch has views that no store holds. The teacher's own training uses them, so that what it says
    later is about pictures to which it was not fitted.
    """

    pictures: Pictures
    num_views: int
    normalise: Normalisation
    targets: Targets | None = None
    fresh_views: bool = False
    terms: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    hard_label_weight: float = 1.0

    @property
    def num_samples(self) -> int:
        return self.pictures.image_set.num_samples

    def order(self, seed: int, epoch: int) -> Tensor:
        """The samples of an epoch in the order in which they are seen, int64 [N]: a function of (seed, epoch).

        It goes by sample id: the same samples in another order are the same data set, and give the same student.
        """
        by_id = torch.argsort(self.pictures.image_set.sample_ids)
        if self.targets is not None and self.targets.slabs is not None:
            return by_id[slab_order(seed, epoch, self.targets.slabs[by_id], self.targets.window)]
        return by_id[epoch_order(seed, epoch, self.num_samples)]

    def stream(self, seed: int, batch_size: int, *, epoch: int, step: int, epochs: int) -> Iterator[Batch]:
        """The batches from step `step` of epoch `epoch` to the end of the last: a pure function of its arguments, so
        that a killed job goes on at the very batch where it stopped.
        """
        steps = num_steps(self.num_samples, batch_size)
        asked: deque[int] = deque()  # pictures are asked for some batches ahead

        def requests() -> Iterator[Request]:
            for number in range(epoch, epochs):
                order = self.order(seed, number)
                for at in range(step if number == epoch else 0, steps):
                    asked.append(number)
                    yield Request(batch_indices(order, at, batch_size), self._view(number))

        for seen in self.pictures.stream(requests()):
            yield self._batch(asked.popleft(), seen)

    def losses(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The weighted losses by name; their sum is what is minimised."""
        if batch.has_targets is not None:
            return self._losses_of_some(student, batch, batch.has_targets)
        hard = self.hard_label_weight * _cross_entropy(student.logits, batch).mean()
        return {"hard_labels": hard} | {name: term(student, batch.teachers) for name, term in self.terms.items()}

    def _losses_of_some(self, student: Outputs, batch: Batch, has_targets: Tensor) -> dict[str, Tensor]:
        """Where stores lack samples: those learn from their hard labels alone, at full weight, and the others' losses
        count by their share of the batch.
        """
        weights = torch.where(has_targets, self.hard_label_weight, 1.0).to(student.logits.device, non_blocking=True)
        losses = {"hard_labels": (weights * _cross_entropy(student.logits, batch)).mean()}
        share = float(has_targets.float().mean())
        if share == 0:
            return losses | {name: student.logits.new_zeros(()) for name in self.terms}
        rows = _twice_if_alone(has_targets.nonzero()[:, 0]).to(student.logits.device, non_blocking=True)
        taught = Outputs(student.logits[rows], {layer: map_[rows] for layer, map_ in student.features.items()})
        return losses | {name: share * term(taught, batch.teachers) for name, term in self.terms.items()}

    def _view(self, epoch: int) -> int:
        return -1 - epoch if self.fresh_views else epoch % self.num_views

    def _batch(self, epoch: int, seen: Seen) -> Batch:
        device, image_set = seen.images.device, self.pictures.image_set
        labels = image_set.labels[seen.positions].to(device, non_blocking=True)
        images = self.normalise(seen.images)
        has_targets = self.targets.known(seen.positions) if self.targets else None
        with_targets = seen.positions if has_targets is None else _twice_if_alone(seen.positions[has_targets])
        teachers = self.targets.batch(epoch % self.num_views, with_targets) if self.targets else ()
        if seen.mixture is None:
            return Batch(images, labels, teachers, has_targets=has_targets)
        mixed = seen.mixture.mixed
        partner_labels = image_set.labels[seen.positions]
        partner_labels[mixed] = self.pictures.labels_of(seen.mixture.partners[mixed])
        partner_labels = partner_labels.to(device, non_blocking=True)
        own_share = seen.mixture.own_share.to(device, non_blocking=True)
        return Batch(images, labels, teachers, partner_labels, own_share, has_targets)


def _twice_if_alone(rows: Tensor) -> Tensor:
    """Rows, int64 [n]; a single one twice, as an adapter's norm needs two, and the mean of two is that of the one."""
    return rows.repeat(2) if len(rows) == 1 else rows


def _cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """The cross entropy with the hard labels, [B]; with both labels of a mixed sample, each by its share."""
    own = F.cross_entropy(logits.float(), batch.labels, reduction="none")
    if batch.partner_labels is None or batch.own_share is None:
        return own
    partners = F.cross_entropy(logits.float(), batch.partner_labels, reduction="none")
    return batch.own_share * own + (1 - batch.own_share) * partners
