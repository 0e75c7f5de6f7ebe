"""Which maps of a student and a teacher can be brought to one size, and the sentence for those that cannot."""

from __future__ import annotations

from torch import Tensor

from stages.errors import RecipeError
from stages.forms import Shape

Size = tuple[int, int]


def map_size(shape: Shape) -> Size | None:
    """(H, W) of maps (C, H, W); None for what is no map."""
    return (shape[1], shape[2]) if len(shape) == 3 else None


def as_map_shape(shape: Shape) -> Shape:
    """Vectors (D,) are maps (D, 1, 1) of one pixel; others as they are."""
    return (*shape, 1, 1) if len(shape) == 1 else shape


def as_maps(features: Tensor) -> Tensor:
    """Vectors [B, D] as maps [B, D, 1, 1]; others as they are."""
    return features[:, :, None, None] if features.dim() == 2 else features


def poolable(student: Shape, size: Size) -> bool:
    """Whether a student's maps (C, H, W) have this size, or are larger: of equal height and another width, they show
    something else.
    """
    mine = map_size(student)
    return mine is not None and (mine == size or (mine[0] > size[0] and mine[1] >= size[1]))


def cannot_join(loss: str, pair: tuple[str, str], student: Shape, teacher: Shape, wanted: str) -> RecipeError:
    """The refusal of a pair (student's module, teacher's module); shapes without the batch axis.

    wanted: what the pair should have been.
    """
    mine, theirs = pair
    return RecipeError(
        f"{loss} cannot join the student's {mine}, of shape {list(student)}, to the teacher's {theirs}, of "
        f"{list(teacher)}: name {wanted}."
    )
