"""Fine-tune a compressed student with the shared training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdpipe.stages.compress.pruning.sparsity import apply_masks
from kdpipe.stages.config import deciding
from kdpipe.stages.context import Setup
from kdpipe.stages.distillation.spec import Teaching
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.distillation.task_builder import build_lesson
from kdpipe.stages.losses.distillation import student_layers
from kdpipe.stages.models.bundle import Network
from kdpipe.stages.training.job_dir import JobFolder
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.step import Job
from kdpipe.stages.training.task import Lesson


@dataclass(frozen=True)
class FineTuneContext:
    """The student, seed, distillation and folder that all fine-tunings of one compression share.

    Without `teaching` (stores and losses), hard labels alone train the baseline. `root` has the compressed networks.
    """

    student: StudentConfig
    seed: int
    teaching: Teaching | None
    setup: Setup
    root: Path

    @property
    def exports_onnx(self) -> bool:
        """Whether its networks are exported to ONNX; those of the hard-label baseline are not."""
        return self.teaching is not None

    def folder(self, kind: str) -> JobFolder:
        """Return the folder of this seed's network of a kind, such as `pruned`."""
        return JobFolder(self.root / f"{kind}-seed{self.seed}")

    def job_record(
        self, compression: Mapping[str, Any], starts_from: Mapping[str, Any], config: TrainConfig
    ) -> dict[str, Any]:
        """Return everything that determines the result of fine-tuning the network with identity `starts_from`."""
        smoothing = self.student.label_smoothing if self.teaching is None else 0.0
        return {
            **compression,
            "starts_from": starts_from,
            "train": deciding(config),
            "seed": self.seed,
            "data": self.setup.data_identity(),
            "test": self.setup.test_identity(),
            "views": self.setup.shown_views(),
            **({"label_smoothing": smoothing} if smoothing else {}),
            "teaching": self.teaching.to_json() if self.teaching else None,
        }

    def task(self, network: Network) -> Lesson:
        """Build a network's training task: adapters fit its current widths, and schedules are at their end.

        Raises what `build_lesson` raises.
        """
        teaching = self.teaching.main if self.teaching else None
        smoothing = self.student.label_smoothing
        return build_lesson(network, teaching, self.seed, self.setup, label_smoothing=smoothing, settled=True)


@dataclass(frozen=True)
class FineTuneJob:
    """One fine-tuning.

    Attributes:
        name: Its name in progress reports.
        warm_up: Called once, before the first step.
        before_epoch: Called with the model and the epoch's number.
        masks: By parameter name, false where weights stay zero.
    """

    name: str
    network: Network
    folder: JobFolder
    config: TrainConfig
    warm_up: Callable[[nn.Module, Lesson], None] = lambda model, task: None
    before_epoch: Callable[[nn.Module, int], None] = lambda model, epoch: None
    masks: Mapping[str, Tensor] = field(default_factory=dict)


def fine_tune(job: FineTuneJob, context: FineTuneContext) -> list[dict[str, Any]]:
    """Train a network, from its checkpoint if there is one, and return the metrics of each epoch.

    Raises what `train` and `FineTuneContext.task` raise.
    """
    setup, model = context.setup, job.network.model.to(context.setup.device)
    task = context.task(job.network)
    if not job.folder.checkpoint.exists():
        job.warm_up(model, task)
    masks = {name: mask.to(setup.device) for name, mask in job.masks.items()}
    training = Job(
        "compress",
        job.name,
        model,
        task,
        setup.test(job.network.normalise),
        job.config,
        context.seed,
        job.folder,
        student_layers(context.teaching.main.losses) if context.teaching else (),
        job.before_epoch,
        after_step=lambda trained: apply_masks(trained, masks),
    )
    return train(training, setup.device, setup.watch)
