"""Render a recipe's views of a data set's images, and identify them for a store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.views.config import OPERATIONS, Views
from kdpipe.stages.views.mix import MixAssignment, mix, sample_mix
from kdpipe.stages.views.rng import CounterRNG
from kdpipe.stages.views.tensor_engine import MIX_STREAM, TensorEngine, parse_operations

Pixels = NDArray[np.uint8]

NUM_PROBES, NUM_PROBE_VIEWS = 8, 3

UNEQUAL_PROBES = ((240, 320), (320, 240), (375, 500), (256, 256), (96, 160), (500, 333), (64, 64), (333, 500))
"""(H, W) of the probes if the operations give any image the same size."""


def check_views(config: Views) -> None:
    """Raise RecipeError for invalid views, as far as can be checked without images."""
    if config.transform and (config.engine == "tensor" or config.operations):
        raise RecipeError("views.transform replaces views.operations, and needs views.engine = 'transforms'.")
    if config.mix and not config.replay:
        raise RecipeError(
            "[views.mix] needs views.replay = true: the teacher's outputs for one mixture are wrong for another."
        )
    if config.kinds:
        _check_kinds(config)
    elif config.engine == "tensor":
        parse_operations(config.operations)


def _check_kinds(config: Views) -> None:
    if config.operations or config.transform:
        other = "operations" if config.operations else "transform"
        raise RecipeError(
            f"views.kinds has the operations of each kind of view, and views.{other} those of all: remove one of them."
        )
    if len(config.kinds) < 2:
        raise RecipeError(
            f"views.kinds has one kind, {', '.join(config.kinds)}: give two or more, or its operations as "
            "views.operations."
        )
    if config.engine == "tensor":
        for name, operations in config.kinds.items():
            parse_operations(operations, _key_of(name))


def _key_of(kind: str) -> str:
    return f"views.kinds.{kind}"


@dataclass(frozen=True)
class Renderer:
    """Renders the views of images.

    With K kinds of views, view v K + k is the k-th of view v: each kind has random numbers of its own, by that number,
    but for the partners and shares of MixUp and CutMix, which all kinds of a view share.

    Attributes:
        config: The views.
        channels: Channels of the images.
        size: (H, W) of the images; None if their sizes differ.
        partner_pool: Sample ids that MixUp and CutMix draw partners from, int64 [P], ascending.
        operations_key: The recipe's key of the operations, for error messages.
    """

    config: Views
    channels: int
    size: tuple[int, int] | None
    partner_pool: Tensor | None = None
    operations_key: str = OPERATIONS

    @property
    def in_workers(self) -> bool:
        """Whether images are rendered one by one, in worker processes."""
        return self.config.engine == "transforms"

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a view. Raises RecipeError if sizes differ between views, or they cannot be rendered."""
        if self._kinds:
            return self._shape_of_kinds()
        if not self.in_workers:
            assert self.size is not None, "StageContext.renderer rejects images of unequal size for the tensor engine"
            return (self.channels, *self._tensor_engine.output_size(self.size))
        return (self.channels, *self._probe_views[0][0].shape[1:])

    def render_image(self, pixels: Pixels, sample_id: int, view: int) -> Tensor:
        """Do a worker's part: transform one image, uint8 [C, H, W] to uint8 [C, H', W'].

        Raises:
            RecipeError: The transforms fail, or give another size than for the probes.
        """
        if not self.in_workers:
            return torch.from_numpy(pixels)
        if self._kinds:
            return self._kind_of(view).render_image(pixels, sample_id, view)
        rendered = self._apply(pixels, sample_id, view)
        if tuple(rendered.shape) != self.shape:
            raise RecipeError(
                f"[views] gives {tuple(rendered.shape)} (C, H, W) for sample {sample_id}, of {pixels.shape}, and "
                f"{self.shape} for others: end the operations with a Resize or a crop to a size."
            )
        return rendered

    def render_batch(self, images: Tensor, sample_ids: Tensor, view: int) -> Tensor:
        """Do the main process's part before mixing: uint8 [B, C, H, W] to uint8 [B, C, H', W'].

        Sample ids are on the CPU. Stores hold views 0 to V - 1, the teacher's own training uses negative ones.
        """
        if self.in_workers:
            return images
        return self._kind_of(view)._tensor_engine(images, self._rng(sample_ids, view))

    def render_rows(self, images: Tensor, rows: Tensor, sample_ids: Tensor, view: int) -> Tensor:
        """Render the images at `rows`, int64 [B] on the CPU, of uint8 [N, C, H, W] like `render_batch`."""
        return self._kind_of(view)._tensor_engine.render_rows(images, rows, self._rng(sample_ids, view))

    def sample_mix(self, sample_ids: Tensor, view: int) -> MixAssignment | None:
        """Draw the mix of a batch, sample ids int64 [B] on the CPU; None if views are not mixed."""
        if self.config.mix is None or self.partner_pool is None:
            return None
        rng = self._rng(sample_ids, view // max(1, len(self._kinds)), MIX_STREAM)
        return sample_mix(self.config.mix, rng, self.partner_pool, self.shape[1:])

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the pixels of the views, as JSON, with digests of probe views.

        V is not included: more views of the same recipe do not change the first ones. The probes are a fixed pattern,
        not samples, so that a student on part of the data set can render them too; the samples themselves are compared
        by pixel checksums.
        """
        if self._kinds:
            return self._identity_of_kinds()
        return {
            **self._engine_identity(),
            "seed": self.config.seed,
            "image_shape": list(self.shape),
            "mix": self._mix_identity(),
            "probes_sha256": [self._probe_digest(view) for view in range(NUM_PROBE_VIEWS)],
        }

    @cached_property
    def _kinds(self) -> dict[str, Renderer]:
        """The renderer of each kind of views, by its name; empty if they are all alike."""
        named = self.config.of_each_kind.items()
        return {name: replace(self, config=config, operations_key=_key_of(name)) for name, config in named}

    def _kind_of(self, view: int) -> Renderer:
        return list(self._kinds.values())[view % len(self._kinds)] if self._kinds else self

    def _shape_of_kinds(self) -> tuple[int, int, int]:
        shapes = {name: kind.shape for name, kind in self._kinds.items()}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise RecipeError(
                f"views.kinds give images of different sizes (C, H, W): {found}: end the operations of each with a "
                "Resize or a crop to the same size."
            )
        return next(iter(shapes.values()))

    def _identity_of_kinds(self) -> dict[str, Any]:
        """Return what all kinds have in common, and the operations and digests of each, in order."""
        found = {name: kind.identity for name, kind in self._kinds.items()}
        own = ("operations", "probes_sha256")
        common = {key: value for key, value in next(iter(found.values())).items() if key not in own}
        return {**common, "kinds": [{"name": name, **{key: one[key] for key in own}} for name, one in found.items()]}

    def _rng(self, sample_ids: Tensor, view: int, stream: int = 0) -> CounterRNG:
        return CounterRNG(self.config.seed, view, sample_ids, stream)

    @cached_property
    def _tensor_engine(self) -> TensorEngine:
        return parse_operations(self.config.operations, self.operations_key)

    def _engine_identity(self) -> dict[str, Any]:
        if not self.in_workers:
            return self._tensor_engine.to_json()
        from kdpipe.stages.views.transforms_engine import transform_identity

        return transform_identity(self.config)

    def _apply(self, pixels: Pixels, sample_id: int, view: int) -> Tensor:
        from kdpipe.stages.views.transforms_engine import apply_transform

        return apply_transform(self._transform, pixels, sample_id, view, self.config.seed)

    @cached_property
    def _transform(self) -> Callable[[Any], Any]:
        # lazy: torchvision takes as long to import as torch itself
        from kdpipe.stages.views.torchvision_pipeline import build_transform
        from kdpipe.stages.views.transforms_engine import check_deterministic

        transform = build_transform(self.config.operations, self.config.transform, self.operations_key)
        check_deterministic(transform, self._probes[0])
        return transform

    @cached_property
    def _probes(self) -> list[Pixels]:
        """Patterns of the size of the data set's images."""
        return _patterns(self.channels, UNEQUAL_PROBES if self.size is None else (self.size,) * NUM_PROBES)

    @cached_property
    def _probe_views(self) -> list[list[Tensor]]:
        """The first views of each probe, [view][probe], before mixing, all of one size.

        If the operations accept any size, the probes have different sizes: the identity must not change when a part of
        the data set happens to have one size.
        """
        if not self.in_workers:
            assert self.size is not None, "checked by self.shape"
            images, ids = torch.from_numpy(np.stack(self._probes)), torch.arange(NUM_PROBES)
            return [list(self.render_batch(images, ids, view)) for view in range(NUM_PROBE_VIEWS)]
        try:
            return self._render_probes(_patterns(self.channels, UNEQUAL_PROBES))
        except RecipeError as error:
            if self.size is None:
                raise RecipeError(
                    f"{error} The images differ in size, so this was tried on patterns of 64 x 64 pixels and more."
                ) from error
            return self._render_probes(self._probes)

    def _render_probes(self, probes: Sequence[Pixels]) -> list[list[Tensor]]:
        """Render the probes one by one, [view][probe]. Raises RecipeError if their sizes differ."""
        views = [
            [self._apply(probe, number, view) for number, probe in enumerate(probes)] for view in range(NUM_PROBE_VIEWS)
        ]
        first = tuple(views[0][0].shape)
        for probe, view in zip([*probes] * NUM_PROBE_VIEWS, chain(*views), strict=True):
            if tuple(view.shape) != first:
                raise RecipeError(
                    f"all views must have the same size: [views] gives {first} (C, H, W) for one image and "
                    f"{tuple(view.shape)} for one of {probe.shape}: end the operations with a Resize or a crop."
                )
        return views

    def _probe_digest(self, view: int) -> str:
        assert len({tuple(probe.shape) for probe in self._probe_views[view]}) == 1, "checked by self.shape"
        images, ids = torch.stack(self._probe_views[view]), torch.arange(NUM_PROBES)
        if self.config.mix is not None:
            mixture = sample_mix(self.config.mix, self._rng(ids, view, MIX_STREAM), ids, self.shape[1:])
            images = mix(images, images[mixture.partner_ids], mixture)
        return hashlib.sha256(images.numpy().tobytes()).hexdigest()

    def _mix_identity(self) -> dict[str, Any] | None:
        if self.config.mix is None or self.partner_pool is None:
            return None
        partners = hashlib.sha256(self.partner_pool.numpy().astype("<i8").tobytes()).hexdigest()
        return {**asdict(self.config.mix), "num_partners": len(self.partner_pool), "partner_ids_sha256": partners}


def _patterns(channels: int, sizes: Iterable[tuple[int, int]]) -> list[Pixels]:
    """Return images of a fixed pattern: uint8 [C, H, W] for each (H, W)."""
    patterns, start = [], 0
    for height, width in sizes:
        cells = channels * height * width
        pattern = np.arange(start, start + cells, dtype=np.int64) * 31 % 251
        patterns.append(pattern.astype(np.uint8).reshape(channels, height, width))
        start += cells
    return patterns
