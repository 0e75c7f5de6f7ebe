"""A model with its architecture record and input normalization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kdpipe.stages.compute.settings import EXACT, ComputeSettings
from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.models.tokens import is_headless
from kdpipe.stages.models.weights.state_dict import weights_sha256


@dataclass(frozen=True)
class ModelBundle:
    """A network, the record from which it can be rebuilt, its input scaling, and how a teacher is computed."""

    model: nn.Module
    architecture: Mapping[str, Any]
    normalize: Normalization
    compute: ComputeSettings = EXACT

    @property
    def is_headless(self) -> bool:
        """Whether the network returns embeddings in place of logits."""
        return is_headless(self.model)

    def __call__(self, images: Tensor) -> Tensor:
        """Compute the logits [B, num_classes] of images uint8 [B, C, H, W]. Raises ModelError for others."""
        channels = len(self.normalize.mean)
        if not isinstance(images, Tensor) or images.ndim != 4:
            found = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ModelError(
                f"the images are {found}, wanted uint8 [B, {channels}, H, W]: one image needs a batch axis."
            )
        logits: Tensor = self.model(self.normalize(images))
        return logits

    @property
    def identity(self) -> dict[str, Any]:
        """The network's identity: architecture, digest of the weights, and input scaling."""
        return {
            "architecture": dict(self.architecture),
            "weights_sha256": weights_sha256(self.model),
            "normalization": self.normalize.to_json(),
        }
