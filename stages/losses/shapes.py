"""Check that feature maps of student and teacher can be brought to one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, GetPydanticSchema, Strict
from torch import Tensor

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.faults import with_message
from kdpipe.stages.models.tokens import PRE_LOGITS
from kdpipe.stages.targets.feature_spec import Shape

Size = tuple[int, int]

Pair = tuple[str, str]
"""(Student module path, teacher module path)."""

_PAIR = Annotated[Pair, Strict(False), with_message('["STUDENT MODULE", "TEACHER MODULE"]')]
_PAIRS = Annotated[tuple[_PAIR, ...], Strict(False), Field(min_length=1)]

Layers = Annotated[Sequence[Pair], GetPydanticSchema(lambda _, handler: handler(_PAIRS))]
"""Pairs of layers, one or more: a tuple, for which lists are accepted."""

EMBEDDINGS: tuple[Pair, ...] = ((PRE_LOGITS, PRE_LOGITS),)
"""The default of losses on the last vectors of both networks."""


def map_size(shape: Shape) -> Size | None:
    """Return (H, W) of maps (C, H, W), None for other shapes."""
    return (shape[1], shape[2]) if len(shape) == 3 else None


def as_map_shape(shape: Shape) -> Shape:
    """Return vectors (D,) as maps (D, 1, 1) of one pixel, other shapes unchanged."""
    return (*shape, 1, 1) if len(shape) == 1 else shape


def as_maps(features: Tensor) -> Tensor:
    """Return vectors [B, D] as maps [B, D, 1, 1], other features unchanged."""
    return features[:, :, None, None] if features.dim() == 2 else features


def poolable(student: Shape, size: Size) -> bool:
    """Return whether the student's maps (C, H, W) have this size or are larger on both sides.

    Maps of equal height and smaller width show another part of the image.
    """
    own = map_size(student)
    return own is not None and (own == size or (own[0] > size[0] and own[1] >= size[1]))


def shape_mismatch_error(loss: str, pair: Pair, student: Shape, teacher: Shape, expected: str) -> RecipeError:
    """Build the error for a pair of layers whose shapes do not match; `expected` is which layers to choose instead."""
    return RecipeError(
        f"{loss} cannot join the student's {pair[0]}, of shape {list(student)}, to the teacher's {pair[1]}, of shape "
        f"{list(teacher)}: choose {expected}{token_advice(student)}."
    )


def token_advice(*shapes: Shape) -> str:
    """Return what to choose instead, to end a sentence, if a shape is that of tokens (N, D); else nothing."""
    has_tokens = any(len(shape) == 2 for shape in shapes)
    return ", or add .patch_map to the layer of a ViT's tokens" if has_tokens else ""
