"""A recipe's views made ready for a data set's images: what renders them, and how a store recognises them again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.errors import RecipeError
from stages.views.config import ViewsConfig
from stages.views.draw import Draw
from stages.views.mix import Mixture, draw_mixture, mix
from stages.views.tensor_engine import MIX_STREAM, TensorEngine, parse_operations

Pixels = NDArray[np.uint8]

NUM_PROBES, NUM_PROBE_VIEWS = 8, 3

UNEQUAL_PROBES = ((240, 320), (320, 240), (375, 500), (256, 256), (96, 160), (500, 333), (64, 64), (333, 500))
"""(H, W) of the probes where the operations make one size of any."""


def check_views(config: ViewsConfig) -> None:
    """Raise RecipeError for what can be told of a recipe's views before any image is seen."""
    if config.transform and (config.engine == "tensor" or config.operations):
        raise RecipeError("views.transform is instead of views.operations, and needs views.engine = 'transforms'.")
    if config.mix and not config.replay:
        raise RecipeError(
            "[views.mix] needs views.replay = true: what the teacher said about one mixture is wrong for another."
        )
    if config.engine == "tensor":
        parse_operations(config.operations)


@dataclass(frozen=True)
class Renderer:
    """Renders the views of images with `channels` channels of `size` (H, W), or None where they are of unequal size.

    population: int64 [P], ascending: the sample ids from which partners of MixUp and CutMix come.
    """

    config: ViewsConfig
    channels: int
    size: tuple[int, int] | None
    population: Tensor | None = None

    @property
    def in_workers(self) -> bool:
        """Whether images are rendered one by one, which is worker processes' work."""
        return self.config.engine == "transforms"

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a view. Raises RecipeError where views are not all of one size, or cannot be rendered."""
        if not self.in_workers:
            assert self.size is not None, "Setup.renderer refuses images of unequal size for the tensor engine"
            return (self.channels, *self._tensor_engine.output_size(self.size))
        return (self.channels, *self._probe_views[0][0].shape[1:])

    def picture(self, pixels: Pixels, sample_id: int, view: int) -> Tensor:
        """What a worker does: the view of one image, uint8 [C, H, W] to uint8 [C, H', W']. Raises RecipeError where the
        transforms fail, or give it another size than the probes.
        """
        if not self.in_workers:
            return torch.from_numpy(pixels)
        rendered = self._apply(pixels, sample_id, view)
        if tuple(rendered.shape) != self.shape:
            raise RecipeError(
                f"[views] makes {tuple(rendered.shape)} (C, H, W) of sample {sample_id}, of {pixels.shape}, and "
                f"{self.shape} of others: end the operations with a Resize or a crop to a size."
            )
        return rendered

    def batch(self, images: Tensor, sample_ids: Tensor, view: int) -> Tensor:
        """What the main process does, before mixing: uint8 [B, C, H, W], ids int64 [B] on the CPU, to uint8 [B, C, H',
        W']. `view` may be any integer: stores hold the views 0 to V - 1; the teacher's own training uses those below
        zero.
        """
        return images if self.in_workers else self._tensor_engine(images, Draw(self.config.seed, view, sample_ids))

    def pick(self, images: Tensor, rows: Tensor, sample_ids: Tensor, view: int) -> Tensor:
        """`batch` for the images at `rows`, int64 [B] on the CPU, of the uint8 [N, C, H, W] that are held."""
        return self._tensor_engine.pick(images, rows, Draw(self.config.seed, view, sample_ids))

    def mixture(self, sample_ids: Tensor, view: int) -> Mixture | None:
        """With whom and how the samples of a batch, int64 [B] on the CPU, are mixed; None where nothing is."""
        if self.config.mix is None or self.population is None:
            return None
        draw = Draw(self.config.seed, view, sample_ids, MIX_STREAM)
        return draw_mixture(self.config.mix, draw, self.population, self.shape[1:])

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the pixels of every view, as JSON, with digests of probe views.

        V is left out: a store with more views of the same recipe holds the same pictures. The probes are a fixed
        pattern, not samples of the data set, so that a student on a part of the data set can render them too; that the
        samples themselves are the same is checked by their pixel checksums.
        """
        return {
            **self._engine_identity(),
            "seed": self.config.seed,
            "image_shape": list(self.shape),
            "mix": self._mix_identity(),
            "probes_sha256": [self._probe_digest(view) for view in range(NUM_PROBE_VIEWS)],
        }

    @cached_property
    def _tensor_engine(self) -> TensorEngine:
        return parse_operations(self.config.operations)

    def _engine_identity(self) -> dict[str, Any]:
        if not self.in_workers:
            return self._tensor_engine.to_json()
        from stages.views.transforms_engine import describe

        return describe(self.config)

    def _apply(self, pixels: Pixels, sample_id: int, view: int) -> Tensor:
        from stages.views.transforms_engine import apply

        return apply(self._transform, pixels, sample_id, view, self.config.seed)

    @cached_property
    def _transform(self) -> Callable[[Any], Any]:
        # torchvision takes as long to import as torch itself: only its users pay
        from stages.views.transforms_engine import build_transform, require_pure

        transform = build_transform(self.config.operations, self.config.transform)
        require_pure(transform, self._probes[0])
        return transform

    @cached_property
    def _probes(self) -> list[Pixels]:
        """Patterns as large as the data set's images."""
        return _patterns(self.channels, UNEQUAL_PROBES if self.size is None else (self.size,) * NUM_PROBES)

    @cached_property
    def _probe_views(self) -> list[list[Tensor]]:
        """Each probe in its first views, [view][probe], before mixing, all of one size.

        Where operations make one size of any, the probes are of any: that a part of a data set happens to be of one
        size makes no other views of it.
        """
        if not self.in_workers:
            assert self.size is not None, "self.shape has seen to it"
            images, ids = torch.from_numpy(np.stack(self._probes)), torch.arange(NUM_PROBES)
            return [list(self.batch(images, ids, view)) for view in range(NUM_PROBE_VIEWS)]
        try:
            return self._rendered(_patterns(self.channels, UNEQUAL_PROBES))
        except RecipeError as error:
            if self.size is None:
                raise RecipeError(
                    f"{error} Images are of unequal size, so this was tried on patterns of 64 x 64 pixels and more."
                ) from error
            return self._rendered(self._probes)

    def _rendered(self, probes: Sequence[Pixels]) -> list[list[Tensor]]:
        """What workers make of the probes, [view][probe]. Raises RecipeError where that is not of one size."""
        views = [
            [self._apply(probe, number, view) for number, probe in enumerate(probes)] for view in range(NUM_PROBE_VIEWS)
        ]
        first = tuple(views[0][0].shape)
        for probe, view in zip([*probes] * NUM_PROBE_VIEWS, chain(*views), strict=True):
            if tuple(view.shape) != first:
                raise RecipeError(
                    f"the views of one recipe must all be of one size: [views] makes {first} (C, H, W) of one image "
                    f"and {tuple(view.shape)} of one of {probe.shape}: end the operations with a Resize or a crop to "
                    "a size."
                )
        return views

    def _probe_digest(self, view: int) -> str:
        assert len({tuple(one.shape) for one in self._probe_views[view]}) == 1, "self.shape has seen to it"
        images, ids = torch.stack(self._probe_views[view]), torch.arange(NUM_PROBES)
        if self.config.mix is not None:
            draw = Draw(self.config.seed, view, ids, MIX_STREAM)
            mixture = draw_mixture(self.config.mix, draw, ids, self.shape[1:])
            images = mix(images, images[mixture.partners], mixture)
        return hashlib.sha256(images.numpy().tobytes()).hexdigest()

    def _mix_identity(self) -> dict[str, Any] | None:
        if self.config.mix is None or self.population is None:
            return None
        partners = hashlib.sha256(self.population.numpy().astype("<i8").tobytes()).hexdigest()
        return {**asdict(self.config.mix), "num_partners": len(self.population), "partner_ids_sha256": partners}


def _patterns(channels: int, sizes: Iterable[tuple[int, int]]) -> list[Pixels]:
    """Images of a fixed pattern: uint8 [C, H, W] for each (H, W)."""
    patterns, start = [], 0
    for height, width in sizes:
        cells = channels * height * width
        pattern = np.arange(start, start + cells, dtype=np.int64) * 31 % 251
        patterns.append(pattern.astype(np.uint8).reshape(channels, height, width))
        start += cells
    return patterns
