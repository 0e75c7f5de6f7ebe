"""The recipe's `views` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from stages.config import section
from stages.views.mix import MixConfig


@section
class ViewsConfig:
    """Which views there are, and how they are made.

    num_views: V, how many of each sample are cached; epoch e of a student uses view e mod V.
    engine: "tensor" augments whole batches of equally large images on the device; "transforms" runs any pipeline of
    torchvision.transforms.v2, image by image, in worker processes.
    operations: what is done to an image, one after the other, by torchvision's names and arguments.
    transform: instead of operations, "python:MODULE:FUNCTION", which gives the pipeline (engine "transforms").
    mix: MixUp and CutMix, after all operations.
    replay: whether a student sees the very pictures that its targets are about; otherwise it sees new ones each epoch.
    """

    num_views: Annotated[int, Field(ge=1, le=100_000)] = 4
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    engine: Literal["tensor", "transforms"] = "tensor"
    operations: tuple[dict[str, Any], ...] = ()
    transform: Annotated[str, Field(pattern=r"^python:")] | None = None
    mix: MixConfig | None = None
    replay: bool = True

    @property
    def augments(self) -> bool:
        """Whether two views of a sample differ."""
        return bool(self.operations or self.transform or self.mix)
