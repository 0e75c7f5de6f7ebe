"""How a store serves what a loss wants: by an array that holds just that, or by a map from which it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from stages.forms import ATTENTION, INPUT_GRADIENT, MAP, SPATIAL_GRAM, Shape, Wanted, form_shape, take_form
from store import StoreError, TargetStore

LOGITS = "logits"

TELLING = (MAP, ATTENTION)
"""Forms whose arrays have the height and width of the maps: of others a name must say to what these were pooled."""


@dataclass(frozen=True)
class Serving:
    """What is `wanted`, the array that is read for it, what is made of that (None: nothing), and the shape of the
    result, without the batch axis.
    """

    wanted: Wanted
    array: str
    made: Wanted | None
    shape: Shape

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows of the array, [B, ...], to what is wanted, [B, *shape]."""
        return rows if self.made is None else take_form(self.made, rows)


def serve(store: TargetStore, wanted: Wanted) -> Serving:
    """How `store` serves `wanted`. Raises StoreError, naming what it lacks and the command that adds it."""
    shapes = {spec.name: spec.row_shape for spec in store.arrays}
    plain = replace(wanted, size=None)
    for one in (wanted, plain):
        if one.array in shapes and (one == wanted or _fits(shapes[one.array], wanted)):
            return Serving(wanted, one.array, None, shapes[one.array])
    whole = Wanted(wanted.layer, MAP)
    if whole.array in shapes and wanted.form != INPUT_GRADIENT:
        made = wanted.fitted(shapes[whole.array])
        return Serving(wanted, whole.array, made, form_shape(made, shapes[whole.array]))
    held = ", ".join(shapes)
    raise StoreError(
        f"{store.path} holds no {wanted.kind} of {wanted.layer!r}, only {held}: run `kdpipe cache-teacher` with this "
        f"recipe, or with cache.layers = ['{wanted}'] in the recipe that made the store, and it is added."
    )


def arrays_read(store: TargetStore, wanted: Sequence[Wanted]) -> list[str]:
    """The arrays that hold a store's logits and serve `wanted`. Raises what `serve` raises."""
    logits = [spec.name for spec in store.arrays if spec.name.startswith(LOGITS)]
    return list(dict.fromkeys([*logits, *[serve(store, one).array for one in wanted]]))


def smallest(wanted: Wanted, shape: Shape) -> Wanted:
    """What to store of a layer whose outputs have `shape`, so that `wanted` can be served: it, or the map where that
    is no larger. A gradient by the pixels cannot be made of a map.
    """
    fitted = wanted.fitted(shape) if wanted.form in (*TELLING, SPATIAL_GRAM) else wanted
    whole = Wanted(wanted.layer, MAP)
    made = form_shape(fitted, shape)
    keeps_map = wanted.form != INPUT_GRADIENT and _num_elements(shape) <= _num_elements(made)
    return whole if keeps_map else fitted


def _num_elements(shape: Shape) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def _fits(shape: Shape, wanted: Wanted) -> bool:
    """Whether an array of rows of `shape`, of maps in their own size, is of maps no larger than wanted."""
    if wanted.size is None:
        return True
    if wanted.form == SPATIAL_GRAM:
        return shape[0] <= wanted.size[0] * wanted.size[1]
    return wanted.form in TELLING and (len(shape) < 2 or (shape[-2] <= wanted.size[0] and shape[-1] <= wanted.size[1]))
