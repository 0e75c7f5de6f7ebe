"""The recipe's `views` section."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from kdpipe.stages.config import KindName, section
from kdpipe.stages.views.mix import MixConfig


def _as_table(operation: Any) -> Any:
    """Convert an operation given by its name, or built in Python, to what a recipe's JSON has."""
    try:
        return json.loads(json.dumps({"name": operation} if isinstance(operation, str) else operation))
    except TypeError as error:
        raise ValueError(
            "an operation is a name, or a table of a name and plain arguments; give objects of torchvision with "
            "views.transform = 'python:MODULE:FUNCTION'"
        ) from error


def _as_tuple(given: Any) -> Any:
    if isinstance(given, str | Mapping):
        raise ValueError(  # noqa: TRY004 - pydantic wants it
            f"operations are a list, as in [{given!r}]"
        )
    return tuple(given) if isinstance(given, list) else given


Operations = Annotated[
    tuple[
        Annotated[dict[str, Any], BeforeValidator(_as_table, json_schema_input_type=str | dict[str, Any])],
        ...,
    ],
    BeforeValidator(_as_tuple),
]


OPERATIONS = "views.operations"


@section
class Views:
    """Configuration of the augmented views.

    Example:
        >>> views = Views(8, ["RandomCrop", {"name": "RandomRotation", "degrees": 10}], engine="transforms")
        >>> views.operations[0]
        {'name': 'RandomCrop'}
        >>> Views(4, kinds={"weak": ["RandomCrop"], "strong": ["RandomCrop", "RandAugment"]}).num_stored
        8

    Attributes:
        num_views: Number V of cached views for each sample, of each kind; epoch e of a student uses view e mod V.
        seed: Seed of all random numbers of the views.
        engine: "tensor" augments whole batches of equally sized images on the device; "transforms" runs any pipeline
            of torchvision.transforms.v2, image by image, in worker processes.
        operations: Operations applied in sequence, with torchvision's names and arguments; a name alone has the
            default arguments.
        kinds: Instead of operations, those of each kind of view by name, two kinds or more: a student's step shows
            every image in one view of each. The store has the K kinds of view v as views v K to v K + K - 1.
        transform: Instead of operations, "python:MODULE:FUNCTION" that returns the pipeline (engine "transforms").
        mix: MixUp and CutMix, after all operations.
        replay: Whether a student sees the same views that its targets were computed on; otherwise new ones each epoch.
    """

    num_views: Annotated[int, Field(ge=1, le=100_000)] = field(default=4, kw_only=False)
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    engine: Literal["tensor", "transforms"] = "tensor"
    operations: Operations = field(default=(), kw_only=False)
    transform: Annotated[str, Field(pattern=r"^python:")] | None = None
    mix: MixConfig | None = None
    replay: bool = True
    kinds: dict[KindName, Operations] = field(default_factory=dict)

    if TYPE_CHECKING:  # the arguments have more types than the attributes

        def __init__(
            self,
            num_views: int = 4,
            operations: Sequence[str | Mapping[str, Any]] = (),
            *,
            seed: int = 0,
            engine: Literal["tensor", "transforms"] = "tensor",
            transform: str | None = None,
            mix: MixConfig | None = None,
            replay: bool = True,
            kinds: Mapping[str, Sequence[str | Mapping[str, Any]]] = ...,
        ) -> None: ...

    @property
    def augments(self) -> bool:
        """Whether two views of a sample differ."""
        return bool(self.operations or self.transform or self.mix or any(self.kinds.values()))

    @property
    def num_stored(self) -> int:
        """The number of views of each sample in a store, of all kinds."""
        return self.num_views * max(1, len(self.kinds))

    @property
    def of_each_kind(self) -> dict[str, Views]:
        """The views of each kind by itself, by its name; empty without kinds."""
        return {name: replace(self, kinds={}, operations=operations) for name, operations in self.kinds.items()}

    def name_of(self, view: int) -> str:
        """Return what a view of a store is called: its number, and its kind if there are several."""
        number, kind = divmod(view, max(1, len(self.kinds)))
        return f"view {number}" + (f", {list(self.kinds)[kind]}" if self.kinds else "")
