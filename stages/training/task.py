"""The training task: images in their views, hard labels and, for a student, the targets of stores."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from kdpipe.stages.data.image_set import UNLABELED
from kdpipe.stages.data.loader.image_loader import ImageBatch, ImageLoader, ViewRequest
from kdpipe.stages.data.loader.labels import HardLabels, hard_labels_of
from kdpipe.stages.data.loader.sampling import balanced_order, batch_indices, epoch_order, num_steps, shard_order
from kdpipe.stages.errors import DataError
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.distillation import Distillation, mean_of
from kdpipe.stages.losses.inputs import Negatives
from kdpipe.stages.losses.schedules import FINISHED, Scheduled, TrainProgress, value_at
from kdpipe.stages.losses.weighted import DistillationBatch
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.numerics import derive_seed
from kdpipe.stages.runtime.collectives import all_reduce_sum, local_share_of_mean
from kdpipe.stages.runtime.distributed import SINGLE, ProcessGroup
from kdpipe.stages.targets.outputs import TeacherTargets
from kdpipe.stages.targets.reader import Targets
from kdpipe.stages.training.heads import Heads

HARD_LABELS = "hard_labels"
"""The name of the loss with the labels."""


@dataclass(frozen=True)
class StepPosition:
    """A step of a training: its seed, epoch of `epochs`, and step in the epoch, from 0."""

    seed: int
    epoch: int
    step: int
    epochs: int


@dataclass(frozen=True)
class Batch:
    """A batch of B samples, in one view or in one of each kind, with labels and targets.

    Attributes:
        images: Normalized images, float32 [B, C, H, W]; of K kinds of views [K B, C, H, W], one kind after the other.
        hard: The labels of the images, mixed ones included.
        ranks: Each sample's rank among all ids, int64 [B].
        progress: The epoch, for scheduled weights.
        teachers: For each store, the teacher's outputs; of several kinds of views those of one after the other.
        target_masks: For each store, a mask of samples with targets, bool [B] on the CPU; None where it has all.
        negatives: By loss, the negatives of a contrastive loss.
    """

    images: Tensor
    hard: HardLabels
    ranks: Tensor
    progress: TrainProgress
    teachers: Sequence[TeacherTargets] = ()
    target_masks: Sequence[Tensor | None] = ()
    negatives: Mapping[str, Negatives] = field(default_factory=dict)

    @property
    def has_targets(self) -> Tensor | None:
        """Mask of samples for which any store has targets, bool [B] on the CPU; None for all of them."""
        masks = [mask for mask in self.target_masks if mask is not None]
        return torch.stack(masks).any(0) if masks and len(masks) == len(self.target_masks) else None

    @property
    def num_samples(self) -> int:
        return len(self.ranks)

    def in_kind(self, number: int, count: int) -> Batch:
        """Return the batch in one of `count` kinds of views, without the images."""
        if count == 1:
            return self
        num_stores = len(self.target_masks)
        return replace(self, teachers=self.teachers[number * num_stores :][:num_stores])

    def split(self, count: int) -> Iterator[Batch]:
        """Yield `count` micro-batches of nearly equal size, in order; each sample with all its views."""
        if count == 1:
            yield self
            return
        starts = torch.arange(0, len(self.images), max(1, self.num_samples))[:, None]
        for indices in torch.tensor_split(torch.arange(self.num_samples), count):
            here = indices.to(self.images.device, non_blocking=True)
            rows = (starts + indices).flatten().to(self.images.device, non_blocking=True)
            yield replace(
                self,
                images=self.images.detach()[rows],
                hard=self.hard.rows(here),
                ranks=self.ranks[here],
                teachers=[teacher.rows(here) for teacher in self.teachers],
                target_masks=[None if mask is None else mask[indices] for mask in self.target_masks],
            )


@dataclass(frozen=True)
class TrainingTask:
    """A training task: a data set's images in their views, labels, targets and losses.

    Attributes:
        loader: The images in their views.
        num_views: The number of views; epoch e, or pass e over fewer samples, has view e mod num_views, of all kinds.
        normalize: The student's input normalization.
        targets: The teachers' outputs; None without a teacher.
        distillation: The weighted sum of the distillation losses; None without a teacher.
        fresh_views: Whether every epoch has views that no store holds. The teacher is trained on them, so that it is
            not fitted to the views of which its outputs are cached.
        hard_label_weight: The weight of the cross entropy with the labels.
        label_smoothing: The share of each label that is spread over all classes.
        is_fine_tuning: Whether all schedules have ended, as in fine-tuning.
        hints_only: Whether the student runs only up to its hint layers, with no loss but those on its features.
        balanced: Whether each epoch has all classes equally often, in place of each sample once.
        class_weights: Factors of the cross entropy with the labels, float32 [num_classes] on the loader's device.
        first_kind: Whether the images are shown in the first kind of view alone, as those that a teacher learns from.
        hard_label_views: The kinds of views with a cross entropy with the labels; none for all.
        heads: The student's modules whose outputs are learned in place of its logits; without a teacher none.
    """

    loader: ImageLoader
    num_views: int
    normalize: Normalization
    targets: Targets | None = None
    fresh_views: bool = False
    distillation: Distillation | None = None
    hard_label_weight: Scheduled = 1.0
    label_smoothing: float = 0.0
    is_fine_tuning: bool = False
    hints_only: bool = False
    balanced: bool = False
    class_weights: Tensor | None = None
    first_kind: bool = False
    hard_label_views: Sequence[str] = ()
    heads: Heads = field(default_factory=Heads)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of views that a step shows; ("",) if there is one."""
        renderer = self.loader.renderer
        kinds = tuple(renderer.config.kinds) if renderer is not None else ()
        return kinds[: 1 if self.first_kind else None] or ("",)

    @property
    def num_samples(self) -> int:
        return self.loader.dataset.num_samples

    @cached_property
    def learned(self) -> Tensor:
        """The positions of the samples that are learned from, by ascending id: without a teacher the labeled ones."""
        dataset = self.loader.dataset
        by_id = torch.argsort(dataset.sample_ids)
        return by_id if self.targets is not None else by_id[dataset.labels[by_id] != UNLABELED]

    @cached_property
    def ranks(self) -> Tensor:
        """Each sample's rank among all ids, int64 [N]."""
        return torch.argsort(torch.argsort(self.loader.dataset.sample_ids))

    @property
    def needs_input_gradient(self) -> bool:
        """Whether a loss uses the gradient by the pixels."""
        configs = self.distillation.configs.values() if self.distillation else ()
        return any(config.input_gradient for config in configs)

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return the order of an epoch's samples, int64 [N], a function of (seed, epoch).

        It depends on sample ids, not positions: reordering the data set gives the same student. An epoch of fewer than
        N samples passes over them several times, and the next one goes on where it stopped.
        """
        by_id = self.learned
        if self.targets is not None and self.targets.slabs is not None:
            return by_id[shard_order(seed, epoch, self.targets.slabs[by_id], self.targets.window)]
        if self.balanced:
            chosen = balanced_order(seed, epoch, self.loader.dataset.labels[by_id], self.num_samples)
            return by_id[chosen]
        first, start = divmod(epoch * self.num_samples, len(by_id))
        num_passes = -(-(start + self.num_samples) // len(by_id))
        passes = [epoch_order(seed, first + number, len(by_id)) for number in range(num_passes)]
        return by_id[torch.cat(passes)[start : start + self.num_samples]]

    def stream(
        self, seed: int, batch_size: int, *, epoch: int, step: int, epochs: int, process_group: ProcessGroup = SINGLE
    ) -> Iterator[Batch]:
        """Yield this process's rows of the batches from step `step` of epoch `epoch` to the end of epoch `epochs` - 1.

        It is a pure function of its arguments, so that a killed job resumes at the batch where it stopped. The rows of
        all processes together are the batches of a single process.
        """
        steps = num_steps(self.num_samples, batch_size)
        positions: deque[StepPosition] = deque()  # images are requested some batches ahead

        def requests() -> Iterator[ViewRequest]:
            for number in range(epoch, epochs):
                order = self.order(seed, number)
                for position in range(step if number == epoch else 0, steps):
                    positions.append(StepPosition(seed, number, position, epochs))
                    rows = process_group.rows(batch_indices(order, position, batch_size))
                    passes = (number * self.num_samples + position * batch_size) // len(self.learned)
                    yield from (ViewRequest(rows, view) for view in self.views_at(passes))

        loaded = self.loader.stream(requests())
        for first in loaded:
            others = list(islice(loaded, len(self.views_at(0)) - 1))
            yield self.batch_of(positions.popleft(), [first, *others])

    def losses(self, student: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted losses by name, this process's share of them; their sum is minimized.

        The mean over the processes is the loss of the global batch. Samples without targets learn from their hard
        labels only, at full weight. If a loss uses the input's gradient, batch.images must require one.
        """
        global_batch_size = all_reduce_sum(len(batch.hard.labels))
        outputs, count = self._by_kind(student), len(self.kinds)
        labeled = [self.heads.of_labels(output) for output in outputs]
        hard = {} if self.hints_only else {HARD_LABELS: self._hard_loss_of_kinds(labeled, batch, global_batch_size)}
        if self.distillation is None:
            return hard
        gradients: Sequence[Tensor | None] = [None] * count
        if self.needs_input_gradient and not self.hints_only:
            gradients = self._input_gradient(labeled, batch).tensor_split(count)
        losses: dict[str, Tensor] = self.distillation(
            *(
                self.distillation_batch(distilled, batch.in_kind(number, count), global_batch_size, gradient)
                for number, (distilled, gradient) in enumerate(
                    zip(map(self.heads.of_distillation, outputs), gradients, strict=True)
                )
            )
        )
        return hard | losses

    def _by_kind(self, student: ModelOutput) -> list[ModelOutput]:
        """Return the outputs for the images of each kind of view."""
        if (count := len(self.kinds)) == 1:
            return [student]
        features = {layer: feature.tensor_split(count) for layer, feature in student.features.items()}
        return [
            ModelOutput(logits, {layer: parts[number] for layer, parts in features.items()})
            for number, logits in enumerate(student.logits.tensor_split(count))
        ]

    def _hard_loss_of_kinds(self, outputs: Sequence[ModelOutput], batch: Batch, global_batch_size: int) -> Tensor:
        """Return the mean of the loss with the labels over the kinds of views that have it."""
        chosen = [
            output
            for kind, output in zip(self.kinds, outputs, strict=True)
            if not self.hard_label_views or kind in self.hard_label_views
        ]
        return mean_of([self.hard_loss(output.logits, batch, global_batch_size) for output in chosen])

    def hard_loss(self, logits: Tensor, batch: Batch, global_batch_size: int) -> Tensor:
        """Return this process's share of the weighted loss of logits [B, num_classes] with the labels."""
        label_losses = batch.hard.losses(logits, self.label_smoothing, self.class_weights)
        weight = value_at(self.hard_label_weight, batch.progress)
        has_targets = batch.has_targets
        if has_targets is None:
            return weight * local_share_of_mean(label_losses, global_batch_size)
        weights = torch.where(has_targets, weight, 1.0).to(label_losses.device, non_blocking=True)
        return local_share_of_mean(weights * label_losses, global_batch_size)

    def distillation_batch(
        self, student: ModelOutput, batch: Batch, global_batch_size: int, gradient: Tensor | None = None
    ) -> DistillationBatch:
        """Return what the losses of a student get, with the targets of the batch."""
        return DistillationBatch(
            student,
            batch.teachers,
            batch.target_masks,
            batch.hard.classes,
            batch.ranks,
            batch.progress,
            batch.negatives,
            gradient,
            global_batch_size,
            batch.hard,
        )

    def _input_gradient(self, outputs: Sequence[ModelOutput], batch: Batch) -> Tensor:
        """Return the gradient of the unsmoothed loss with the labels by the pixels of all images, part of the graph."""
        loss = torch.stack([batch.hard.losses(output.logits).sum() for output in outputs]).sum()
        (gradient,) = torch.autograd.grad(loss, batch.images, create_graph=True)
        return self.normalize.to_pixel_gradient(gradient)

    def views_at(self, passes: int) -> list[int]:
        """Return the views of the images of a batch after so many passes over them, one of each kind that is shown."""
        number, kinds = -1 - passes if self.fresh_views else passes % self.num_views, self._num_kinds
        return [number * kinds + kind for kind in range(len(self.kinds))]

    @cached_property
    def _num_kinds(self) -> int:
        """The number of kinds of views, shown or not."""
        return max(1, len(self.loader.renderer.config.kinds)) if self.loader.renderer is not None else 1

    def batch_of(self, position: StepPosition, views: Sequence[ImageBatch]) -> Batch:
        """Return the batch at a position from its images in the views of `views_at`."""
        image_batch = views[0]
        indices, first = image_batch.indices, position.epoch % self.num_views * self._num_kinds
        images = self.normalize(image_batch.images)
        if len(views) > 1:
            require_same_images(views)
            images = torch.cat([images, *(self.normalize(one.images) for one in views[1:])])
        numbers = range(first, first + len(self.kinds))
        return Batch(
            images=images,
            hard=hard_labels_of(self.loader, image_batch),
            ranks=self.ranks[indices].to(image_batch.images.device, non_blocking=True),
            progress=FINISHED if self.is_fine_tuning else TrainProgress(position.epoch, position.epochs),
            teachers=[one for view in numbers for one in self.targets.batch(view, indices)] if self.targets else (),
            target_masks=self.targets.target_masks(indices) if self.targets else (),
            negatives=self._negatives(position, first),
        )

    def _negatives(self, position: StepPosition, first: int) -> dict[str, Negatives]:
        """Return the negatives of each contrastive loss, a function of (seed, epoch, step).

        `first` is the view of the first kind.
        """
        if self.targets is None or self.distillation is None:
            return {}
        return {
            name: self._sample_negatives(name, config, position, first + self._kind_of_targets(config))
            for name, config in self.distillation.configs.items()
            if config.num_negatives
        }

    def _kind_of_targets(self, config: Loss) -> int:
        kind = config.target_view or config.view
        return 0 if kind is None else self.kinds.index(kind)

    def _sample_negatives(self, name: str, config: Loss, position: StepPosition, view: int) -> Negatives:
        assert self.targets is not None
        # The word "others" is part of the seed: another one would draw other negatives.
        seed = derive_seed(position.seed, "others", name, position.epoch, position.step)
        generator = torch.Generator().manual_seed(seed)
        store = config.store or 0
        candidates = self.targets.samples_with_targets(store)
        chosen = candidates[torch.randint(len(candidates), (config.num_negatives,), generator=generator)]
        device = self.loader.device
        return Negatives(
            self.targets.features(store, view, chosen, config.negative_features),
            self.loader.dataset.labels[chosen].to(device, non_blocking=True),
            self.ranks[chosen].to(device, non_blocking=True),
        )


def require_same_images(views: Sequence[ImageBatch]) -> None:
    """Raise DataError if a batch has other samples in one view than in another."""
    if any(not torch.equal(one.indices, views[0].indices) for one in views):
        raise DataError("some images could be read in one view and not in another: set data.unreadable = 'stop'.")
