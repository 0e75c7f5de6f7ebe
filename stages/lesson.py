"""What a network is taught from: images in their views, hard labels, and, for a student, what stores say about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.datasets.image_set import ImageSet
from stages.errors import RunError
from stages.features import Outputs, TeacherOutputs
from stages.order import epoch_order, slab_order
from stages.targets import Targets
from stages.views import ViewsConfig, render


@dataclass(frozen=True)
class Normalisation:
    """A model's own scaling of its input: (pixel / 255 - mean) / std for each channel. Views come before it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to float32 [B, C, H, W]."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)

    def to_json(self) -> dict[str, list[float]]:
        return {"mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Normalisation:
        """The scaling in the record that is kept with a network's weights. Raises RunError where there is none."""
        try:
            held = record["normalisation"]
            return Normalisation(tuple(map(float, held["mean"])), tuple(map(float, held["std"])))
        except (KeyError, TypeError, ValueError) as error:
            raise RunError("a network's weights lack the record of how it scales its input: train it again.") from error


@dataclass(frozen=True)
class Batch:
    """Images float32 [B, C, H, W], normalised; labels int64 [B]; what each store holds for them."""

    images: Tensor
    labels: Tensor
    teachers: Sequence[TeacherOutputs]


@dataclass(frozen=True)
class Lesson:
    """The samples on a device, their views, and the targets that go with them.

    `fresh_views` gives every epoch views that no store holds: the teacher's own training uses them, so that what it
    says later is about pictures it was not fitted to.
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    views: ViewsConfig
    normalise: Normalisation
    targets: Targets | None = None
    fresh_views: bool = False
    terms: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    hard_label_weight: float = 1.0

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    def order(self, seed: int, epoch: int) -> Tensor:
        """The samples of an epoch in the order in which they are seen, int64 [N]: a function of (seed, epoch).

        It goes by sample id: the same samples in another order are the same data set, and give the same student.
        """
        by_id = torch.argsort(self.sample_ids.cpu())
        if self.targets is not None and self.targets.slabs is not None:
            return by_id[slab_order(seed, epoch, self.targets.slabs[by_id], self.targets.window)]
        return by_id[epoch_order(seed, epoch, self.num_samples)]

    def batch(self, epoch: int, indices: Tensor, device: torch.device) -> Batch:
        """The samples at `indices`, int64 [B], in the view that `epoch` uses, with their targets."""
        view = -1 - epoch if self.fresh_views else epoch % self.views.num_views
        at = indices.to(self.images.device)
        images = render(self.images[at], self.sample_ids[at], view, self.views).to(device, non_blocking=True)
        teachers = self.targets.batch(view, indices) if self.targets else ()
        return Batch(self.normalise(images), self.labels[at].to(device, non_blocking=True), teachers)

    def losses(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        """The weighted losses by name; their sum is what is minimised."""
        hard = F.cross_entropy(student.logits.float(), batch.labels)
        losses = {"hard_labels": self.hard_label_weight * hard}
        return losses | {name: term(student, batch.teachers) for name, term in self.terms.items()}


def place(image_set: ImageSet, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and ids where they are used: on the device if they take less than half of its free memory."""
    where = device
    if device.type == "cuda" and image_set.images.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        where = torch.device("cpu")
    return image_set.images.to(where), image_set.labels.to(where), image_set.sample_ids.to(where)
