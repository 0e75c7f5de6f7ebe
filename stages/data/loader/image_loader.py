"""Load the images of batches: from memory on the device, or decoded and rendered ahead by worker processes.

A stream is a pure function of its requests: a resumed job continues from the batch where it stopped. Targets are joined
by the main process, not here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import starmap

import torch
from torch import Tensor

from kdpipe.stages.compute.threads import AdaptiveThreads
from kdpipe.stages.data.image_set import ImageSet, unequal_sizes_message
from kdpipe.stages.data.loader.workers import Failure, PrefetchPool, WorkerTask
from kdpipe.stages.errors import DataError, RecipeError
from kdpipe.stages.runtime.cpu import num_cores
from kdpipe.stages.runtime.gpu.transfers import empty_on_host, upload
from kdpipe.stages.runtime.memory import free_gpu_bytes
from kdpipe.stages.views.mix import MixAssignment, mix
from kdpipe.stages.views.ops.resize import resize
from kdpipe.stages.views.ops.rows import replace_rows
from kdpipe.stages.views.renderer import Renderer


@dataclass(frozen=True)
class ViewRequest:
    """The samples at `indices` of a data set, int64 [B], in a view; None means the original images."""

    indices: Tensor
    view: int | None = None


@dataclass(frozen=True)
class ImageBatch:
    """The images of a batch, uint8 [B, C, H, W], on the device.

    Attributes:
        indices: Positions of the samples in the data set, int64 [B], without unreadable ones.
        mixture: The partners mixed into the images.
    """

    images: Tensor
    indices: Tensor
    mixture: MixAssignment | None = None


_MixedRequest = tuple[ViewRequest, MixAssignment | None]


def _stop(message: str) -> None:
    raise DataError(message)


@dataclass(frozen=True)
class ImageLoader:
    """Loads the images of a data set in batches.

    Attributes:
        device: Device of the loaded images.
        renderer: Renders the views; None if only original images are requested.
        mix_partners: The data set of the partners of MixUp and CutMix; None means `dataset`.
        num_workers: Worker processes; None means one for each available core, 0 works in this process.
        on_failure: Called with a message for each unreadable image; unless it raises, the sample is dropped from its
            batch.
        size: Side of the square to which all images are resized, after views and mixing; None leaves their size.
    """

    dataset: ImageSet
    device: torch.device
    renderer: Renderer | None = None
    mix_partners: ImageSet | None = None
    num_workers: int | None = None
    on_failure: Callable[[str], None] = _stop
    size: int | None = None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of the original images as they are loaded; None for files of unequal size."""
        return self.dataset.image_size if self.size is None else (self.size, self.size)

    def stream(self, requests: Iterable[ViewRequest], *, require_all: bool = False) -> Iterator[ImageBatch]:
        """Load one request after the other; requests may be drawn ahead.

        With `require_all` every unreadable image is an error, regardless of `on_failure`. Raises DataError if so, if no
        image of a batch can be read, or if original images of different sizes are requested.
        """
        pairs = ((request, self._sample_mix(request)) for request in requests)
        in_memory = self._images is not None
        return starmap(self._load_from_memory, pairs) if in_memory else self._load_ahead(pairs, require_all)

    def get(self, request: ViewRequest, *, require_all: bool = True) -> ImageBatch:
        """Load a single request."""
        return next(self.stream([request], require_all=require_all))

    def partner_labels(self, partner_ids: Tensor) -> Tensor:
        """Return the labels of partners, int64 [B], by their sample ids."""
        return (self.mix_partners or self.dataset).labels_at(self._partner_indices(partner_ids))

    @cached_property
    def _images(self) -> Tensor | None:
        """The images, on the device if they take less than half of its free memory; None if workers load them."""
        partners_in_memory = self.mix_partners is None or self.mix_partners.in_memory
        if not partners_in_memory or not isinstance(self.dataset.images, Tensor):
            return None
        if self.renderer and self.renderer.in_workers:
            return None
        return _to_device_if_fits(self.dataset.images, self.device)

    @cached_property
    def _partner_images(self) -> Tensor | None:
        if self.mix_partners is None or not isinstance(self.mix_partners.images, Tensor):
            return self._images
        return _to_device_if_fits(self.mix_partners.images, self.device)

    @cached_property
    def _prefetch_pool(self) -> PrefetchPool:
        num_workers = num_cores() if self.num_workers is None else self.num_workers
        return PrefetchPool(self.dataset, self.mix_partners, self.renderer, num_workers, self.device.type == "cuda")

    @cached_property
    def _partner_order(self) -> tuple[Tensor, Tensor]:
        """The ids of the partners' data set, ascending, and their positions: both int64 [P]."""
        return torch.sort((self.mix_partners or self.dataset).sample_ids)

    def _partner_indices(self, partner_ids: Tensor) -> Tensor:
        ids, order = self._partner_order
        return order[torch.searchsorted(ids, partner_ids)]

    def _sample_mix(self, request: ViewRequest) -> MixAssignment | None:
        if self.renderer is None or request.view is None:
            return None
        return self.renderer.sample_mix(self.dataset.sample_ids[request.indices], request.view)

    @cached_property
    def _threads(self) -> AdaptiveThreads:
        return AdaptiveThreads()

    def _adapted(self, num_images: int, work: Callable[[], ImageBatch]) -> ImageBatch:
        """Return the batch that `work` makes, of the same pixels with any number of CPU threads, resized."""

        def resized() -> ImageBatch:
            batch = work()
            return batch if self.size is None else replace(batch, images=resize(batch.images, (self.size, self.size)))

        return self._threads.run(num_images, resized) if self.device.type == "cpu" else resized()

    def _load_from_memory(self, request: ViewRequest, mixture: MixAssignment | None) -> ImageBatch:
        return self._adapted(len(request.indices), partial(self._gather, request, mixture))

    def _gather(self, request: ViewRequest, mixture: MixAssignment | None) -> ImageBatch:
        assert self._images is not None and self._partner_images is not None
        sample_ids = self.dataset.sample_ids[request.indices]
        own = self._render_rows(self._images, request.indices, sample_ids, request.view)
        if mixture is None or not mixture.mixed.any():
            return ImageBatch(own, request.indices, mixture)
        partner_ids = mixture.partner_ids[mixture.mixed]
        indices = self._partner_indices(partner_ids)
        partners = self._render_rows(self._partner_images, indices, partner_ids, request.view)
        return _mix(request, mixture, own, partners)

    def _render_rows(self, source: Tensor, indices: Tensor, sample_ids: Tensor, view: int | None) -> Tensor:
        """Render some of the images in memory, on the device."""
        if source.device.type == self.device.type:
            if self.renderer is not None and view is not None:
                return self.renderer.render_rows(source, indices, sample_ids, view)
            images = source.index_select(0, indices.to(source.device, non_blocking=True))
        else:
            images = empty_on_host((len(indices), *source.shape[1:]), source.dtype, self.device)
            torch.index_select(source, 0, indices, out=images)
        return self._render(images, sample_ids, view)

    def _load_ahead(self, pairs: Iterable[_MixedRequest], require_all: bool) -> Iterator[ImageBatch]:
        """Load from worker processes."""
        pending: deque[_MixedRequest] = deque()

        def tasks() -> Iterator[WorkerTask]:
            for request, mixture in pairs:
                if request.view is None and self.dataset.image_size is None:
                    raise DataError(unequal_sizes_message(self.dataset))
                pending.append((request, mixture))
                if mixture is None:
                    yield WorkerTask(request.view, request.indices.numpy())
                    continue
                rows = mixture.mixed.nonzero()[:, 0]
                partners = self._partner_indices(mixture.partner_ids[mixture.mixed])
                yield WorkerTask(request.view, request.indices.numpy(), rows.numpy(), partners.numpy())

        for result in self._prefetch_pool.stream(tasks()):
            request, mixture = pending.popleft()
            self._report(result.failures, require_all)
            kept = result.kept
            if not len(kept):
                first = result.failures[0]
                raise DataError(
                    f"none of the {len(request.indices)} images of a batch of {self.dataset.name} can be read, "
                    f"including sample {first.sample_id}: {first.why}"
                )
            if len(kept) < len(request.indices):
                request = ViewRequest(request.indices[kept], request.view)
                mixture = None if mixture is None else mixture.at(kept)
            yield self._adapted(len(kept), partial(self._finish, result.images, request, mixture))

    def _finish(self, images: Tensor, request: ViewRequest, mixture: MixAssignment | None) -> ImageBatch:
        """Do the main process's part for images uint8 [K + L, C, H, W] of a worker: K of the request, L partners."""
        num_own = len(request.indices)
        own = self._render(images[:num_own], self.dataset.sample_ids[request.indices], request.view)
        if mixture is None or not mixture.mixed.any():
            return ImageBatch(own, request.indices, mixture)
        partners = self._render(images[num_own:], mixture.partner_ids[mixture.mixed], request.view)
        return _mix(request, mixture, own, partners)

    def _render(self, images: Tensor, sample_ids: Tensor, view: int | None) -> Tensor:
        """Do the main process's part of rendering: uint8 [B, C, H, W], on the device."""
        images = upload(images, self.device)
        return images if self.renderer is None or view is None else self.renderer.render_batch(images, sample_ids, view)

    def _report(self, failures: Iterable[Failure], require_all: bool) -> None:
        for failure in failures:
            if failure.kind == "recipe":
                raise RecipeError(failure.why)
            message = f"sample {failure.sample_id}: {failure.why}"
            if require_all or failure.kind == "data":
                _stop(message)
            self.on_failure(message)


def _mix(request: ViewRequest, mixture: MixAssignment, own: Tensor, partners: Tensor) -> ImageBatch:
    """Mix `own`, uint8 [B, C, H, W], with `partners`, those of the mixed samples only."""
    partner_images = replace_rows(own, mixture.mixed.nonzero()[:, 0], partners)
    return ImageBatch(mix(own, partner_images, mixture), request.indices, mixture)


def _to_device_if_fits(images: Tensor, device: torch.device) -> Tensor:
    """Move images to the device if they take less than half of its free memory."""
    if device.type == "cuda" and images.nbytes > free_gpu_bytes(device) // 2:
        return images
    return images.to(device)
