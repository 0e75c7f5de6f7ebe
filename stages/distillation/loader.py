"""A loader of images in the teacher's views with its cached outputs, for training loops other than kdpipe's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kdpipe.stages.config import whole_number
from kdpipe.stages.context import StageContext, model_normalization
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.loader.labels import HardLabels
from kdpipe.stages.data.loader.mix_partners import find_partners
from kdpipe.stages.data.loader.sampling import num_steps
from kdpipe.stages.data.sources.torch_dataset import image_set_from_dataset
from kdpipe.stages.data.tasks import CLASSIFICATION
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.models.normalization import Normalization, Numbers, as_normalization
from kdpipe.stages.runtime.distributed import ProcessGroup
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.runtime.gpu.device import check_device, torch_device
from kdpipe.stages.targets.feature_spec import TEACHER_HEAD, FeatureSpec, parse_feature, parse_statistic
from kdpipe.stages.targets.join import join
from kdpipe.stages.targets.open import open_store_anywhere, open_with_views
from kdpipe.stages.targets.outputs import TeacherTargets, concatenated
from kdpipe.stages.targets.reader import TargetLoadingConfig, Targets
from kdpipe.stages.targets.resolve import LOGITS
from kdpipe.stages.training.task import Batch, TrainingTask
from kdpipe.stages.views.from_store import views_of_store
from kdpipe.store import TargetStore


class StudentBatch(dict[str, Any]):
    """A batch as a dict of tensors, so that Lightning, Accelerate and the HF Trainer can move it.

    Its entries are attributes too: `batch.images` is `batch["images"]`. Of a store with K kinds of views it has each
    sample K times, all samples in the first kind and then all in the next: `logits.chunk(K)` are those of each kind.

    Attributes:
        images: Normalized images in the very view that the teacher saw, float32 [B, C, H, W].
        labels: int64 [B]; of views mixed by MixUp or CutMix, probabilities float32 [B, num_classes], as torchvision's
            CutMix returns. `F.cross_entropy` takes either.
        teacher_logits: float32 [B, num_classes]; not there where the store has embeddings.
        features: The teacher's features by name, float32 [B, ...], and its head, "pre_logits:head", [C, D + 1].
        sample_ids: int64 [B].
        teacher: Everything the store has of these samples, for losses of kdpipe; an attribute only, not an entry.
    """

    if TYPE_CHECKING:
        images: Tensor
        labels: Tensor
        teacher_logits: Tensor
        features: dict[str, Tensor]
        sample_ids: Tensor
        teacher: TeacherTargets

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the batch has no {name!r}, only {', '.join(self)}") from None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StudentBatch:
        """Return the batch on another device."""
        move = partial(_move, move=lambda tensor: tensor.to(device, non_blocking=non_blocking))
        moved = StudentBatch(move(dict(self)))
        if "teacher" in vars(self):
            moved.teacher = move(self.teacher)
        return moved


class DistillationLoader:
    """Images in the views that the teacher saw, with labels and its outputs, in the batches of kdpipe's own training.

    Each iteration is one epoch: epoch e has view e mod V, of all kinds, in an order that depends on (seed, epoch)
    alone. All batches are full; the rest of the samples differs from epoch to epoch. One iteration at a time: a new one
    ends the last.

    Example:
        >>> import kdpipe as kd
        >>> train, test = kd.load_dataset("digits", test_share=0.5)
        >>> teacher, views = kd.create_model("cnn", train), kd.Views(2, ["RandomCrop"])
        >>> store = kd.cache_teacher(teacher, train, "store.zarr", views=views, mean=[0.3], std=[0.4], progress=False)
        >>> for batch in kd.DistillationLoader(store, train, batch_size=400):
        ...     print(tuple(batch.images.shape), tuple(batch.labels.shape), tuple(batch.teacher_logits.shape))
        (400, 1, 8, 8) (400,) (400, 10)
        (400, 1, 8, 8) (400,) (400, 10)

    Attributes:
        dataset: The images.
        store: The opened store.
        batch_size: Samples of a batch, over all processes.
        views: The views that the store was made from.
        normalize: Scales uint8 images [B, C, H, W] as those of the batches, for test images.
    """

    def __init__(
        self,
        store: TargetStore | str | Path,
        dataset: Any,
        *,
        batch_size: int = 128,
        seed: int = 0,
        features: str | Sequence[str] | None = None,
        normalize: Normalization | tuple[Numbers, Numbers] | None = None,
        image_size: int | None = None,
        temperature: float = 1.0,
        device: torch.device | str = "cpu",
        num_workers: int | None = None,
        rank: int | None = None,
        num_replicas: int | None = None,
        mix_partners: Any = None,
        target_loading: TargetLoadingConfig | None = None,
        monitor: RunMonitor | None = None,
    ) -> None:
        """Open the store, and check that its targets are those of these images.

        Args:
            store: The store, its path or its URL.
            dataset: The images that the teacher saw, or some of them: an `ImageSet`, or any map-style torch Dataset of
                (image, label).
            batch_size: Samples of a batch; several processes share them.
            seed: Seed of the order.
            features: The features to read, such as "stage2" or "stage2:pooled"; by default all that the store has.
            normalize: The scaling of another loader, or (mean, std), each a number or one for each channel, for pixels
                in [0, 1]; by default the data set's.
            image_size: Side of the square to which the views are resized; by default they are as the teacher saw them.
            temperature: The temperature of the softmax at which `teacher_logits` of a store with the k largest logits
                are exact; complete logits are the same at any.
            device: The device of the batches; "auto" is the GPU if there is one.
            num_workers: Processes that decode images; by default one per core, none for images in memory.
            rank: This process's number; by default that of torch.distributed, if it is initialized.
            num_replicas: The number of processes; likewise.
            mix_partners: The whole data set, if `dataset` lacks images that the store mixed into its own.
            target_loading: Sizes up to which targets are kept in memory, mapped, or streamed; when mapped ones are
                checked; whether links that lead out of the store are followed.
            monitor: Receives progress and warnings.

        Raises:
            StoreError: There is no such store, or it lacks samples or features.
            FingerprintMismatch: Labels, pixels or views are not those that the teacher saw.
            RecipeError: The processes cannot share the batches, or an argument is invalid.
        """
        monitor = monitor or RunMonitor()
        follow_links = target_loading is not None and target_loading.follow_links
        opened = (
            store if isinstance(store, TargetStore) else open_store_anywhere(store, monitor, follow_links=follow_links)
        )
        self.store, self.seed = opened, whole_number("seed", seed)
        self.batch_size = batch_size = whole_number("batch_size", batch_size, minimum=1)
        num_workers = None if num_workers is None else whole_number("num_workers", num_workers)
        self.dataset = dataset = _image_set(dataset)
        self.views = views_of_store(opened)
        self._process_group = _process_group(rank, num_replicas)
        self._process_group.require_shares(batch_size, dataset.num_samples)
        context = StageContext(
            opened.path, dataset, dataset, self.views, _device(device), monitor, num_workers=num_workers
        )
        if self.views.mix is not None:
            context = replace(context, mix_partners=find_partners(opened.path, dataset, mix_partners))
        open_with_views(opened.path, context.view_identity(), {})
        self._temperature = temperature
        if opened.manifest.encoding is not None:
            opened.manifest.encoding.require_temperature(temperature)
        named = [features] if isinstance(features, str) else features
        specs = _all_features(opened) if named is None else [parse_feature(name, "features") for name in named]
        self._features = {str(spec): spec for spec in specs}
        self.normalize = (
            model_normalization(dataset, None, None, None)
            if normalize is None
            else as_normalization(normalize, dataset.in_channels)
        )
        side = None if image_size is None else whole_number("image_size", image_size, minimum=1)
        self._task = TrainingTask(
            context.resized(side).train_loader,
            self.views.num_views,
            self.normalize,
            Targets([join(opened, dataset, specs)], context.device, target_loading),
        )
        self._ids = torch.sort(dataset.sample_ids).values.to(context.device)
        self._next = self._position = (0, 0)
        self._iteration = 0

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return num_steps(self.dataset.num_samples, self.batch_size)

    def __iter__(self) -> Iterator[StudentBatch]:
        """Yield the batches of the next epoch, or those left of the one that `load_state_dict` resumed.

        The epoch begins with its first batch: an iterator that is never asked for one, as Lightning makes, skips none.
        """
        epoch, step = self._position = self._next
        self._next = (epoch + 1, 0)
        self._iteration = iteration = self._iteration + 1
        stream = self._task.stream(
            self.seed, self.batch_size, epoch=epoch, step=step, epochs=epoch + 1, process_group=self._process_group
        )
        for number, batch in enumerate(stream, step + 1):
            if iteration != self._iteration:
                raise RuntimeError("this epoch cannot continue: another iteration of the same loader was started.")
            self._position = (epoch, number) if number < len(self) else (epoch + 1, 0)
            yield self._student_batch(batch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, as in torch's DistributedSampler; a resumed epoch keeps its step."""
        epoch = whole_number("epoch", epoch)
        if epoch != self._next[0]:
            self._next = self._position = (epoch, 0)

    def state_dict(self) -> dict[str, int]:
        """Return the position after the last batch that was yielded."""
        return {"seed": self.seed, "epoch": self._position[0], "step": self._position[1]}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at a position. Raises RecipeError for one of another seed, or outside an epoch."""
        if {"seed", "epoch", "step"} - state.keys():
            raise RecipeError(
                f"the loader's state has {list(state)}, wanted seed, epoch and step, as state_dict returns."
            )
        epoch, step = state["epoch"], state["step"]
        if state["seed"] != self.seed or epoch < 0 or not 0 <= step <= len(self):
            raise RecipeError(
                f"the loader's state is of seed {state['seed']}, epoch {epoch}, step {step}, and this loader has seed "
                f"{self.seed} and {len(self)} steps an epoch: create it with the arguments of the saved one."
            )
        self._next = self._position = (epoch, step) if step < len(self) else (epoch + 1, 0)

    def _student_batch(self, batch: Batch) -> StudentBatch:
        teacher, count = concatenated(batch.teachers), len(batch.teachers)
        made = StudentBatch(
            images=batch.images,
            labels=torch.cat([_labels(batch.hard, self.dataset.num_classes)] * count),
            **({"teacher_logits": teacher.logits_at(self._temperature)} if self.store.manifest.has_logits else {}),
            features={name: teacher.features[spec] for name, spec in self._features.items()},
            sample_ids=self._ids[batch.ranks].repeat(count),
        )
        made.teacher = teacher
        return made


def _labels(hard: HardLabels, num_classes: int) -> Tensor:
    """Return int64 [B], or float32 [B, num_classes] of mixed views, several labels or numbers."""
    if hard.partner_labels is None or hard.own_share is None:
        return hard.labels
    if hard.task != CLASSIFICATION:
        return torch.lerp(hard.partner_labels, hard.labels, hard.own_share[:, None])
    shifted = (labels + 1 for labels in (hard.labels, hard.partner_labels))  # the first column is for unlabeled ones
    own, partners = (F.one_hot(labels, num_classes + 1)[:, 1:].float() for labels in shifted)
    return torch.lerp(partners, own, hard.own_share[:, None])


def _all_features(store: TargetStore) -> list[FeatureSpec]:
    parts = [spec.name.partition("/") for spec in store.arrays if not spec.name.startswith(LOGITS)]
    head = [TEACHER_HEAD] if store.manifest.head else []
    return [*(spec for kind, _, layer in parts if (spec := parse_statistic(layer, kind))), *head]


def _image_set(dataset: Any) -> ImageSet:
    if isinstance(dataset, ImageSet):
        return dataset
    return image_set_from_dataset(dataset, name=type(dataset).__name__, split="train")


def _process_group(rank: int | None, count: int | None) -> ProcessGroup:
    """Return the given process of the given number, by default those of torch.distributed."""
    if (rank is None) != (count is None):
        raise RecipeError("rank and num_replicas must be given together.")
    if rank is None or count is None:
        initialized = dist.is_available() and dist.is_initialized()
        return ProcessGroup(dist.get_rank(), dist.get_world_size()) if initialized else ProcessGroup()
    if not 0 <= rank < count:
        raise RecipeError(f"rank is {rank}: it must be at least 0 and below num_replicas, {count}.")
    return ProcessGroup(rank, count)


def _device(device: torch.device | str) -> torch.device:
    if check_device(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch_device(device)


def _move(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """Move the tensors in a dict, or in the fields of a teacher's outputs."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, Mapping):
        return {key: _move(each, move) for key, each in value.items()}
    if hasattr(value, "logits_at"):
        return replace(value, **{field.name: _move(getattr(value, field.name), move) for field in fields(value)})
    return value
