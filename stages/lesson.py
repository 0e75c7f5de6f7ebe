"""What a network is taught from: images in their views, hard labels, and, for a student, what stores say about them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stages.errors import RunError
from stages.features import Outputs, TeacherOutputs
from stages.hard_labels import HardLabels, labels_of
from stages.losses.entry import Entry
from stages.losses.global_batch import part_of_mean, total
from stages.losses.said import Others
from stages.losses.terms import Distillation, Exchange
from stages.order import batch_indices, derive_seed, epoch_order, num_steps, slab_order
from stages.pictures import Pictures, Request, Seen
from stages.processes import ONE, Processes
from stages.schedules import SETTLED, Amount, Moment, amount_at
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

    def gradient_by_pixels(self, gradient: Tensor) -> Tensor:
        """A gradient by the normalised input, [B, C, H, W], as one by the pixels in [0, 1]: the ground that models of
        different scalings share.
        """
        return gradient / torch.tensor(self.std, device=gradient.device, dtype=gradient.dtype).view(-1, 1, 1)

    def to_json(self) -> dict[str, list[float]]:
        return {"mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Normalisation:
        """The scaling in the record that is kept with a network's weights. Raises RunError where there is none."""
        try:
            held = record["normalization"]
            mean, std = (tuple(map(float, held[name])) for name in ("mean", "std"))
        except (KeyError, TypeError, ValueError) as error:
            raise RunError("a network's weights lack the record of how it scales its input: train it again.") from error
        if not all(map(math.isfinite, (*mean, *std))) or min(std, default=0) <= 0:
            raise RunError(f"a network's record scales its input by mean {mean} and std {std}: train it again.")
        return Normalisation(mean, std)


@dataclass(frozen=True)
class Place:
    """A step of a training: its seed, its epoch of `epochs`, and the step in it, counted from 0."""

    seed: int
    epoch: int
    step: int
    epochs: int


@dataclass(frozen=True)
class Batch:
    """Images float32 [B, C, H, W], normalised; their labels; what each store says of them.

    known: for each store, which samples it has targets for, bool [B] on the CPU; None where it has all.
    ranks: each sample's place among all ids, int64 [B]. others: by loss, the samples that it contrasts these with.
    """

    images: Tensor
    hard: HardLabels
    ranks: Tensor
    moment: Moment
    teachers: Sequence[TeacherOutputs] = ()
    known: Sequence[Tensor | None] = ()
    others: Mapping[str, Others] = field(default_factory=dict)

    @property
    def has_targets(self) -> Tensor | None:
        """Which samples any store has targets for, bool [B] on the CPU; None for all of them."""
        masks = [mask for mask in self.known if mask is not None]
        return torch.stack(masks).any(0) if masks and len(masks) == len(self.known) else None

    def parts(self, count: int) -> Iterator[Batch]:
        """The same in `count` batches, of sizes as equal as may be, the samples in their order."""
        if count == 1:
            yield self
            return
        for at in torch.tensor_split(torch.arange(len(self.images)), count):
            here = at.to(self.images.device, non_blocking=True)
            yield replace(
                self,
                images=self.images.detach()[here],
                hard=self.hard.rows(here),
                ranks=self.ranks[here],
                teachers=[teacher.rows(here) for teacher in self.teachers],
                known=[None if mask is None else mask[at] for mask in self.known],
            )


@dataclass(frozen=True)
class Lesson:
    """The pictures of a data set in their views, and the targets that go with them.

    fresh_views: every epoch has views that no store holds. The teacher's own training uses them, so that what it says
    later is about pictures to which it was not fitted. hard_label_weight: of the cross entropy with the labels, which
    are smoothed by label_smoothing. settled: fine-tuning, for which all ramps have ended. hints_only: the student does
    not run to its end, and nothing but the losses on its features counts.
    """

    pictures: Pictures
    num_views: int
    normalise: Normalisation
    targets: Targets | None = None
    fresh_views: bool = False
    distillation: Distillation | None = None
    hard_label_weight: Amount = 1.0
    label_smoothing: float = 0.0
    settled: bool = False
    hints_only: bool = False

    @property
    def num_samples(self) -> int:
        return self.pictures.image_set.num_samples

    @cached_property
    def ranks(self) -> Tensor:
        """Each sample's place among all ids, int64 [N]."""
        return torch.argsort(torch.argsort(self.pictures.image_set.sample_ids))

    @property
    def needs_input_gradient(self) -> bool:
        """Whether a loss looks at the gradient by the pixels."""
        configs = self.distillation.configs.values() if self.distillation else ()
        return any(config.input_gradient for config in configs)

    def order(self, seed: int, epoch: int) -> Tensor:
        """The samples of an epoch in the order in which they are seen, int64 [N]: a function of (seed, epoch).

        It goes by sample id: the same samples in another order are the same data set, and give the same student.
        """
        by_id = torch.argsort(self.pictures.image_set.sample_ids)
        if self.targets is not None and self.targets.slabs is not None:
            return by_id[slab_order(seed, epoch, self.targets.slabs[by_id], self.targets.window)]
        return by_id[epoch_order(seed, epoch, self.num_samples)]

    def stream(
        self, seed: int, batch_size: int, *, epoch: int, step: int, epochs: int, processes: Processes = ONE
    ) -> Iterator[Batch]:
        """This process's rows of the batches from step `step` of epoch `epoch` to the end of the last: a pure function
        of its arguments, so that a killed job goes on at the very batch where it stopped. All processes' rows together
        are the batches of one process.
        """
        steps = num_steps(self.num_samples, batch_size)
        asked: deque[Place] = deque()  # pictures are asked for some batches ahead

        def requests() -> Iterator[Request]:
            for number in range(epoch, epochs):
                order = self.order(seed, number)
                for at in range(step if number == epoch else 0, steps):
                    asked.append(Place(seed, number, at, epochs))
                    yield Request(processes.rows(batch_indices(order, at, batch_size)), self._view(number))

        for seen in self.pictures.stream(requests()):
            yield self._batch(asked.popleft(), seen)

    def losses(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The weighted losses by name, this process's parts of them; the mean of the parts over the processes is the
        loss of the global batch, and the sum of the losses is what is minimised.

        Samples of which no store knows learn from their hard labels alone, at full weight. Where a loss looks at the
        input's gradient, batch.images must require one.
        """
        num_samples = total(len(batch.hard.labels))
        if self.hints_only and self.distillation is not None:
            only: dict[str, Tensor] = self.distillation(self._exchange(student, batch, num_samples))
            return only
        cross_entropy = batch.hard.cross_entropy(student.logits, self.label_smoothing)
        weight = amount_at(self.hard_label_weight, batch.moment)
        has_targets = batch.has_targets
        if has_targets is None:
            hard = weight * part_of_mean(cross_entropy, num_samples)
        else:
            weights = torch.where(has_targets, weight, 1.0).to(cross_entropy.device, non_blocking=True)
            hard = part_of_mean(weights * cross_entropy, num_samples)
        if self.distillation is None:
            return {"hard_labels": hard}
        gradient = self._input_gradient(student, batch) if self.needs_input_gradient else None
        losses: dict[str, Tensor] = self.distillation(self._exchange(student, batch, num_samples, gradient))
        return {"hard_labels": hard} | losses

    def _exchange(self, student: Outputs, batch: Batch, num_samples: int, gradient: Tensor | None = None) -> Exchange:
        return Exchange(
            student,
            batch.teachers,
            batch.known,
            batch.hard.labels,
            batch.ranks,
            batch.moment,
            batch.others,
            gradient,
            num_samples,
        )

    def _input_gradient(self, student: Outputs, batch: Batch) -> Tensor:
        """The gradient of the cross entropy, labels not smoothed, by the pixels, [B, C, H, W], part of the graph."""
        cross_entropy = batch.hard.cross_entropy(student.logits).sum()
        (gradient,) = torch.autograd.grad(cross_entropy, batch.images, create_graph=True)
        return self.normalise.gradient_by_pixels(gradient)

    def _view(self, epoch: int) -> int:
        return -1 - epoch if self.fresh_views else epoch % self.num_views

    def _batch(self, place: Place, seen: Seen) -> Batch:
        at, view = seen.positions, place.epoch % self.num_views
        return Batch(
            images=self.normalise(seen.images),
            hard=labels_of(self.pictures, seen),
            ranks=self.ranks[at].to(seen.images.device, non_blocking=True),
            moment=SETTLED if self.settled else Moment(place.epoch, place.epochs),
            teachers=self.targets.batch(view, at) if self.targets else (),
            known=self.targets.known(at) if self.targets else (),
            others=self._others(place, view),
        )

    def _others(self, place: Place, view: int) -> dict[str, Others]:
        """For each loss that contrasts, the samples that it does so with: a function of (seed, epoch, step)."""
        if self.targets is None or self.distillation is None:
            return {}
        return {
            name: self._drawn(name, config, place, view)
            for name, config in self.distillation.configs.items()
            if config.num_others
        }

    def _drawn(self, name: str, config: Entry, place: Place, view: int) -> Others:
        assert self.targets is not None
        seed = derive_seed(place.seed, "others", name, place.epoch, place.step)
        generator = torch.Generator().manual_seed(seed)
        store = config.store or 0
        held = self.targets.positions(store)
        at = held[torch.randint(len(held), (config.num_others,), generator=generator)]
        device = self.pictures.device
        return Others(
            self.targets.features(store, view, at, config.wanted_of_others),
            self.pictures.image_set.labels[at].to(device, non_blocking=True),
            self.ranks[at].to(device, non_blocking=True),
        )
