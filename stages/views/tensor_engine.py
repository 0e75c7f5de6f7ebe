"""The tensor engine: augment whole batches of uint8 images on their device.

Small images need no worker processes and no Python per sample: a view of a batch is a few dozen tensor operations.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.faults import fault_sentence, value_text
from kdpipe.stages.views.config import OPERATIONS
from kdpipe.stages.views.ops.affine import RandomAffine
from kdpipe.stages.views.ops.color import ColorJitter, RandomGrayscale
from kdpipe.stages.views.ops.crop import RandomCrop, RandomHorizontalFlip, RandomResizedCrop, RandomVerticalFlip
from kdpipe.stages.views.ops.erase import Cutout, RandomErasing
from kdpipe.stages.views.ops.rand_augment import RandAugment, TrivialAugmentWide
from kdpipe.stages.views.rng import CounterRNG
from kdpipe.store.errors import did_you_mean

ENGINE_VERSION = 2
"""Increase it whenever the same parameters would give other pixels: stores of an older engine are then rejected."""


class Operation(Protocol):
    """One step of a view: a recipe section with a name."""

    name: Any

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (H, W) of the output for images of (H, W). Raises RecipeError if they are not supported."""

    def __call__(self, images: Tensor, rng: CounterRNG) -> Tensor:
        """Transform uint8 [B, C, H, W] to uint8 [B, C, H', W'], by the samples' own random numbers."""


_STREAMS: dict[Any, int] = {
    RandomCrop: 1,
    RandomHorizontalFlip: 3,
    RandomVerticalFlip: 4,
    RandomResizedCrop: 1 << 8,
    RandomAffine: 2 << 8,
    ColorJitter: 3 << 8,
    RandomGrayscale: 4 << 8,
    RandomErasing: 5 << 8,
    Cutout: 6 << 8,
    RandAugment: 7 << 8,
    TrivialAugmentWide: 8 << 8,
}
"""The random streams of the operations: never change one, or stores replay different views."""

_NEXT_OCCURRENCE = 1 << 16
"""Offset between the streams of operations of the same name."""

MIX_STREAM = 9 << 8

_OPERATIONS = {str(get_args(get_type_hints(kind)["name"])[0]): kind for kind in _STREAMS}


@dataclass(frozen=True)
class TensorEngine:
    """A sequence of operations, each with its stream."""

    operations: tuple[tuple[Operation, int], ...]

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (H, W) of a view of images of (H, W). Raises RecipeError if an operation does not support them."""
        for operation, _ in self.operations:
            size = operation.output_size(size)
        return size

    def __call__(self, images: Tensor, rng: CounterRNG, *, in_place: bool = False) -> Tensor:
        """Render a batch: uint8 [B, C, H, W] to uint8 [B, C, H', W']. `in_place` allows overwriting `images`."""
        source = images.untyped_storage().data_ptr()
        for operation, stream in self.operations:
            # the output of an earlier operation may be overwritten, which saves a copy
            in_place = in_place or images.untyped_storage().data_ptr() != source
            apply = getattr(operation, "overwrite", operation) if in_place else operation
            images = apply(images, rng.fork(stream))
        return images

    def render_rows(self, images: Tensor, rows: Tensor, rng: CounterRNG) -> Tensor:
        """Render the images at `rows`, int64 [B] on the CPU, of uint8 [N, C, H, W] on any device."""
        first = self.operations[0] if self.operations else None
        if first is None or not isinstance(first[0], RandomCrop):
            return self(images.index_select(0, rows.to(images.device, non_blocking=True)), rng)
        rest = TensorEngine(self.operations[1:])
        return rest(first[0].crop_rows(images, rows, rng.fork(first[1])), rng, in_place=True)

    def to_json(self) -> dict[str, Any]:
        """Return everything that determines the pixels, as JSON."""
        return {
            "engine": "tensor",
            "engine_version": ENGINE_VERSION,
            "operations": [asdict(operation) for operation, _ in self.operations],  # type: ignore[call-overload]
        }


def parse_operations(tables: Sequence[Mapping[str, Any]], where: str = OPERATIONS) -> TensorEngine:
    """Build the engine for the operations at a key of a recipe. Raises RecipeError for an invalid operation."""
    occurrences: Counter[str] = Counter()
    operations = []
    for number, table in enumerate(tables):
        operation = _parse(table, f"{where}.{number}")
        stream = _STREAMS[type(operation)] + occurrences[operation.name] * _NEXT_OCCURRENCE
        occurrences[operation.name] += 1
        operations.append((operation, stream))
    return TensorEngine(tuple(operations))


def _parse(table: Mapping[str, Any], where: str) -> Operation:
    name = table.get("name")
    kind = _OPERATIONS.get(str(name))
    if kind is None:
        hint = did_you_mean(str(name), _OPERATIONS)
        raise RecipeError(
            f"{where}: the tensor engine has no operation {name!r} (views.engine = 'transforms' supports all "
            f"of torchvision's); {hint}"
        )
    try:
        operation: Operation = TypeAdapter(kind).validate_json(json.dumps(table, default=str))
    except ValidationError as error:
        raise RecipeError(_error_message(where, kind, error)) from error
    if getattr(operation, "is_identity", False):
        raise RecipeError(f"{where}: {name} changes nothing with these arguments: give it others, or remove it.")
    return operation


def _error_message(where: str, kind: Any, error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        hint = did_you_mean(key, [field.name for field in fields(kind)])
        return f"{where}: {kind.__name__} has no argument {key!r}; {hint}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{where}: {kind.__name__} requires {key!r}."
    return f"{where}: {kind.__name__}: {key} = {value_text(first['input'])}: {fault_sentence(first)}."
