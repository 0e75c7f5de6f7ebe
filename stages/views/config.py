"""The recipe's `views` section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kdpipe.stages.config import section
from kdpipe.stages.views.mix import MixConfig


@section
class ViewsConfig:
    """Configuration of the augmented views.

    Attributes:
        num_views: Number V of cached views for each sample; epoch e of a student uses view e mod V.
        seed: Seed of all random numbers of the views.
        engine: "tensor" augments whole batches of equally sized images on the device; "transforms" runs any pipeline
            of torchvision.transforms.v2, image by image, in worker processes.
        operations: Operations applied in sequence, with torchvision's names and arguments.
        transform: Instead of operations, "python:MODULE:FUNCTION" that returns the pipeline (engine "transforms").
        mix: MixUp and CutMix, after all operations.
        replay: Whether a student sees the same views that its targets were computed on; otherwise new ones each epoch.
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
