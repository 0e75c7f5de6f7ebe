"""Where the pictures of a batch come from: images held on the device, or decoded and rendered ahead by workers.

A stream of pictures is a pure function of the requests that are made of it: a killed job asks again from the very
batch where it stopped. Targets never pass through here: the main process joins them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stages.datasets.image_set import ImageSet, unequal_sizes_message
from stages.decode_ahead import Ask, DecodeAhead, Failure
from stages.errors import DataError, RecipeError
from stages.machine.cores import num_cores
from stages.views.mix import Mixture, mix
from stages.views.renderer import Renderer
from stages.views.rows import replaced


@dataclass(frozen=True)
class Request:
    """The samples at `positions` of a data set, int64 [B], in a view; None asks for the images as they are."""

    positions: Tensor
    view: int | None = None


@dataclass(frozen=True)
class Seen:
    """The pictures of a batch, uint8 [B, C, H, W], on the device; where the samples stand in the data set, int64 [B],
    which is without those that could not be read; and what was mixed into them.
    """

    images: Tensor
    positions: Tensor
    mixture: Mixture | None = None


def _stop(sentence: str) -> None:
    raise DataError(sentence)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a data set.

    renderer: makes the views; None where images are only asked for as they are. partners: the data set in which the
    partners of MixUp and CutMix are found. num_workers: worker processes; None is one for each core that this process
    may use, 0 does their work in this one. on_failure: is told of each image that cannot be read, in a sentence;
    what it does not raise drops the sample from its batch.
    """

    image_set: ImageSet
    device: torch.device
    renderer: Renderer | None = None
    partners: ImageSet | None = None
    num_workers: int | None = None
    on_failure: Callable[[str], None] = _stop

    def stream(self, requests: Iterable[Request], *, whole: bool = False) -> Iterator[Seen]:
        """The pictures of one request after the other; requests may be drawn some way ahead.

        whole: an image that cannot be read is an error, whatever `on_failure` says. Raises DataError for one, where not
        one image of a batch can be read, and where images of unequal size are asked for as they are.
        """
        pairs = ((request, self._mixture(request)) for request in requests)
        if self._held is None:
            return self._ahead(pairs, whole)
        return (self._here(request, mixture) for request, mixture in pairs)

    def one(self, request: Request, *, whole: bool = True) -> Seen:
        """The pictures of a single request."""
        return next(self.stream([request], whole=whole))

    def labels_of(self, partner_ids: Tensor) -> Tensor:
        """The labels of partners, int64 [B], by their sample ids."""
        ids, order = self._partner_order
        return (self.partners or self.image_set).labels[order[torch.searchsorted(ids, partner_ids)]]

    @cached_property
    def _held(self) -> Tensor | None:
        """The images where they are rendered: on the device if they take less than half of its free memory. None where
        they are not in memory, or are workers' business.
        """
        partners_held = self.partners is None or self.partners.held
        if not partners_held or not isinstance(self.image_set.images, Tensor):
            return None
        if self.renderer and self.renderer.in_workers:
            return None
        return _place(self.image_set.images, self.device)

    @cached_property
    def _partners_held(self) -> Tensor | None:
        if self.partners is None or not isinstance(self.partners.images, Tensor):
            return self._held
        return _place(self.partners.images, self.device)

    @cached_property
    def _decode_ahead(self) -> DecodeAhead:
        num_workers = num_cores() if self.num_workers is None else self.num_workers
        return DecodeAhead(self.image_set, self.partners, self.renderer, num_workers, self.device.type == "cuda")

    @cached_property
    def _partner_order(self) -> tuple[Tensor, Tensor]:
        """The ids of the data set of partners, ascending, and where each stands: both int64 [P]."""
        ids = (self.partners or self.image_set).sample_ids
        return torch.sort(ids)

    def _mixture(self, request: Request) -> Mixture | None:
        if self.renderer is None or request.view is None:
            return None
        return self.renderer.mixture(self.image_set.sample_ids[request.positions], request.view)

    def _partner_positions(self, mixture: Mixture) -> Tensor:
        """Where the partners of the mixed samples stand in the data set of partners, int64 [M]."""
        ids, order = self._partner_order
        return order[torch.searchsorted(ids, mixture.partners[mixture.mixed])]

    def _here(self, request: Request, mixture: Mixture | None) -> Seen:
        """Pictures from images that are held."""
        assert self._held is not None
        assert self._partners_held is not None
        own = self._pick(self._held, request.positions, self.image_set.sample_ids[request.positions], request.view)
        if mixture is None or not mixture.mixed.any():
            return Seen(own, request.positions, mixture)
        partner_ids = mixture.partners[mixture.mixed]
        partners = self._pick(self._partners_held, self._partner_positions(mixture), partner_ids, request.view)
        return self._mix(request, mixture, own, partners)

    def _pick(self, held: Tensor, positions: Tensor, sample_ids: Tensor, view: int | None) -> Tensor:
        """Some of the images that are held, rendered, on the device."""
        if self.renderer is not None and view is not None and held.device == self.device:
            return self.renderer.pick(held, positions, sample_ids, view)
        images = held.index_select(0, positions.to(held.device, non_blocking=True))
        return self._render(images, sample_ids, view)

    def _ahead(self, pairs: Iterable[tuple[Request, Mixture | None]], whole: bool) -> Iterator[Seen]:
        """Pictures from worker processes."""
        asked: deque[tuple[Request, Mixture | None]] = deque()

        def asks() -> Iterator[Ask]:
            for request, mixture in pairs:
                if request.view is None and self.image_set.image_size is None:
                    raise DataError(unequal_sizes_message(self.image_set))
                asked.append((request, mixture))
                partners = None if mixture is None else self._partner_positions(mixture)
                rows = None if mixture is None else mixture.mixed.nonzero()[:, 0]
                yield Ask(request.view, request.positions, rows, partners)

        for answer in self._decode_ahead.stream(asks()):
            request, mixture = asked.popleft()
            self._tell(answer.failures, whole)
            kept = answer.kept
            if not len(kept):
                first = answer.failures[0]
                raise DataError(
                    f"not one of the {len(request.positions)} images of a batch of {self.image_set.name} can be read, "
                    f"sample {first.sample_id} among them: {first.why}"
                )
            if len(kept) < len(request.positions):
                request = Request(request.positions[kept], request.view)
                mixture = None if mixture is None else mixture.at(kept)
            ids = self.image_set.sample_ids[request.positions]
            own = self._render(answer.images[: len(kept)], ids, request.view)
            if mixture is None or not mixture.mixed.any():
                yield Seen(own, request.positions, mixture)
                continue
            partners = self._render(answer.images[len(kept) :], mixture.partners[mixture.mixed], request.view)
            yield self._mix(request, mixture, own, partners)

    def _render(self, images: Tensor, sample_ids: Tensor, view: int | None) -> Tensor:
        """What of rendering is done here, whole batches at once: uint8 [B, C, H, W], on the device."""
        images = images.to(self.device, non_blocking=True)
        return images if self.renderer is None or view is None else self.renderer.batch(images, sample_ids, view)

    def _mix(self, request: Request, mixture: Mixture, own: Tensor, partners: Tensor) -> Seen:
        """Mix: `own` uint8 [B, C, H, W], and `partners`, those of the mixed samples alone."""
        beside = replaced(own, mixture.mixed.nonzero()[:, 0], partners)
        return Seen(mix(own, beside, mixture), request.positions, mixture)

    def _tell(self, failures: Iterable[Failure], whole: bool) -> None:
        for failure in failures:
            if failure.kind == "recipe":
                raise RecipeError(failure.why)
            sentence = f"sample {failure.sample_id}: {failure.why}"
            if whole or failure.kind == "data":
                _stop(sentence)
            self.on_failure(sentence)


def _place(images: Tensor, device: torch.device) -> Tensor:
    """On the device if they take less than half of its free memory, else where they are."""
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return images
    return images.to(device)
