"""The training task of a cohort: one batch for all members, and the sum of their losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kdpipe.stages.cohort.losses import PEERS, CohortLosses, stored_name
from kdpipe.stages.data.loader.image_loader import ImageBatch
from kdpipe.stages.losses.distillation import student_targets
from kdpipe.stages.losses.user_loss import failure_of
from kdpipe.stages.losses.weighted import DistillationBatch
from kdpipe.stages.models.hooks import MEMBERS, ModelOutput
from kdpipe.stages.numerics import to_float32
from kdpipe.stages.runtime.collectives import all_reduce_sum
from kdpipe.stages.targets.outputs import DenseTargets, TeacherTargets
from kdpipe.stages.training.task import Batch, StepPosition, TrainingTask, require_same_images


@dataclass(frozen=True)
class CohortTask(TrainingTask):
    """A training task of a joint network, whose members' outputs are features `members.N` of it.

    The teachers' targets of a batch are those of each member in turn where each has a view of its own, else one for
    all.

    Attributes:
        layers: For each member, the modules whose features its losses, or those of others, use.
    """

    layers: Sequence[Sequence[str]] = field(default=())

    @property
    def exchange(self) -> CohortLosses:
        """The losses of the members."""
        assert isinstance(self.distillation, CohortLosses)
        return self.distillation

    @property
    def num_members(self) -> int:
        return len(self.layers)

    @property
    def hooked(self) -> list[str]:
        """The modules of the joint network whose outputs are captured."""
        own = [f"{MEMBERS}.{number}" for number in range(self.num_members)]
        return own + [f"{own[number]}.{layer}" for number, layers in enumerate(self.layers) for layer in layers]

    def views_at(self, passes: int) -> list[int]:
        """Return the views of a batch: one for each member where each has its own, which differ, else one for all."""
        if not self.exchange.config.own_views:
            return super().views_at(passes)
        first, members = passes * self.num_members, range(self.num_members)
        return [-1 - first - n if self.fresh_views else (passes + n) % self.num_views for n in members]

    def batch_of(self, position: StepPosition, views: Sequence[ImageBatch]) -> Batch:
        """Return the batch at a position, with the images of the members one behind the other along the channels."""
        batch = super().batch_of(position, views[:1])
        if len(views) == 1:
            return batch
        require_same_images(views)
        teachers: list[TeacherTargets] = []
        for number in range(len(views) if self.targets else 0):
            assert self.targets is not None
            teachers += self.targets.batch((position.epoch + number) % self.num_views, views[0].indices)
        images = torch.cat([batch.images, *(self.normalize(one.images) for one in views[1:])], 1)
        return replace(batch, images=images, teachers=teachers)

    def losses(self, student: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted losses of all members by name, this process's share of them; their sum is minimized."""
        size = all_reduce_sum(len(batch.hard.labels))
        with torch.autocast(student.logits.device.type, enabled=False):
            outputs, ensemble = self._outputs(student), to_float32(student.logits)
            losses = {
                f"hard_labels_{number}": self.hard_loss(one.logits, batch, size) for number, one in enumerate(outputs)
            }
            if self.exchange.config.method == "one":
                losses["hard_labels_ensemble"] = self.hard_loss(ensemble, batch, size)
            losses |= self._from_all(outputs, ensemble, batch, size)
            losses |= self._from_each(outputs, batch, size)
            losses |= dict(self._from_stores(outputs, batch, size))
        return losses

    def _outputs(self, student: ModelOutput) -> list[ModelOutput]:
        """Return the outputs of each member, in float32."""
        return [
            ModelOutput(
                student.features[f"{MEMBERS}.{number}"],
                {layer: student.features[f"{MEMBERS}.{number}.{layer}"] for layer in layers},
            ).to_float32()
            for number, layers in enumerate(self.layers)
        ]

    def _from_all(self, outputs: Sequence[ModelOutput], ensemble: Tensor, batch: Batch, size: int) -> dict[str, Tensor]:
        """Return what each member learns from the logits of the others, or of all combined."""
        exchange, count = self.exchange, self.num_members
        if (factor := exchange.factor(batch.progress)) == 0:
            return {f"{PEERS}_{number}": ensemble.new_zeros(()) for number in range(count)}
        shared = not exchange.config.own_views
        images = [batch.images] * count if shared else batch.images.chunk(count, 1)
        logits = [one.logits for one in outputs]
        targets = exchange.targets(logits, ensemble, images, batch.hard.classes, batch.progress)
        found = {}
        for number, (output, own) in enumerate(zip(outputs, targets, strict=True)):
            losses = [self._learned(PEERS, output, DenseTargets(one, {}), batch, size) for one in own]
            found[f"{PEERS}_{number}"] = factor * torch.stack(losses).mean()
        return found

    def _from_each(self, outputs: Sequence[ModelOutput], batch: Batch, size: int) -> dict[str, Tensor]:
        """Return the further losses of each member from each other one: their means over the others."""
        found: dict[str, list[Tensor]] = {}
        for one in self.exchange.between:
            with failure_of(self.exchange.configs[one.key]):
                target = student_targets(one.features, outputs[one.peer])
                loss = self._learned(one.key, outputs[one.member], target, batch, size)
            found.setdefault(f"{one.name}_{one.member}", []).append(loss)
        return {name: torch.stack(losses).mean() for name, losses in found.items()}

    def _learned(self, name: str, output: ModelOutput, target: TeacherTargets, batch: Batch, size: int) -> Tensor:
        own = replace(batch, teachers=[target], target_masks=[None])
        loss: Tensor = self.exchange.losses[name](self.distillation_batch(output, own, size), target)
        return loss

    def _from_stores(self, outputs: Sequence[ModelOutput], batch: Batch, size: int) -> Iterator[tuple[str, Tensor]]:
        """Yield what each member learns from the stores."""
        stored = self.exchange.stored
        num_teachers = len(batch.teachers) // self.num_members if self.exchange.config.own_views else 0
        for number, (output, own) in enumerate(zip(outputs if stored else (), stored, strict=True)):
            teachers = batch.teachers[number * num_teachers :][: num_teachers or None]
            inputs: DistillationBatch = self.distillation_batch(output, replace(batch, teachers=teachers), size)
            for name, loss in own(inputs).items():
                yield stored_name(name, number), loss
