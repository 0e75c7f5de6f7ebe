"""Fine-tune a compressed student with the shared training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdpipe.stages.compress.pruning.sparsity import apply_masks
from kdpipe.stages.config import config_fingerprint
from kdpipe.stages.context import StageContext
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.distillation.task_builder import build_task
from kdpipe.stages.losses.distillation import student_layers
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.step import TrainJob
from kdpipe.stages.training.task import TrainingTask


@dataclass(frozen=True)
class FineTuneContext:
    """The student, seed, distillation and folder that all fine-tunings of one compression share.

    Without `teaching` (stores and losses), hard labels alone train the baseline. `root` has the compressed networks.
    """

    student: StudentConfig
    seed: int
    spec: DistillationSpec | None
    stage_context: StageContext
    root: Path

    @property
    def exports_onnx(self) -> bool:
        """Whether its networks are exported to ONNX; those of the hard-label baseline are not."""
        return self.spec is not None

    def job_dir(self, kind: str) -> JobDir:
        """Return the folder of this seed's network of a kind, such as `pruned`."""
        return JobDir(self.root / f"{kind}-seed{self.seed}")

    def job_record(
        self, compression: Mapping[str, Any], starts_from: Mapping[str, Any], config: TrainConfig
    ) -> dict[str, Any]:
        """Return everything that determines the result of fine-tuning the network with identity `starts_from`."""
        smoothing = self.student.label_smoothing if self.spec is None else 0.0
        return {
            **compression,
            "starts_from": starts_from,
            "train": config_fingerprint(config),
            "seed": self.seed,
            "data": self.stage_context.data_identity(),
            "test": self.stage_context.test_identity(),
            "views": self.stage_context.student_views(),
            **({"label_smoothing": smoothing} if smoothing else {}),
            "teaching": self.spec.to_json() if self.spec else None,
        }

    def task(self, network: ModelBundle) -> TrainingTask:
        """Build a network's training task: adapters fit its current widths, and schedules are at their end.

        Raises what `build_task` raises.
        """
        spec = self.spec.main_stage if self.spec else None
        smoothing = self.student.label_smoothing
        return build_task(network, spec, self.seed, self.stage_context, label_smoothing=smoothing, is_fine_tuning=True)


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
    network: ModelBundle
    job_dir: JobDir
    config: TrainConfig
    warm_up: Callable[[nn.Module, TrainingTask], None] = lambda model, task: None
    before_epoch: Callable[[nn.Module, int], None] = lambda model, epoch: None
    masks: Mapping[str, Tensor] = field(default_factory=dict)


def fine_tune(job: FineTuneJob, context: FineTuneContext) -> list[dict[str, Any]]:
    """Train a network, from its checkpoint if there is one, and return the metrics of each epoch.

    Raises what `train` and `FineTuneContext.task` raise.
    """
    stage_context, model = context.stage_context, job.network.model.to(context.stage_context.device)
    task = context.task(job.network)
    if not job.job_dir.checkpoint.exists():
        job.warm_up(model, task)
    masks = {name: mask.to(stage_context.device) for name, mask in job.masks.items()}
    training = TrainJob(
        "compress",
        job.name,
        model,
        task,
        stage_context.evaluation(job.network.normalize),
        job.config,
        context.seed,
        job.job_dir,
        student_layers(context.spec.main_stage.losses) if context.spec else (),
        job.before_epoch,
        after_step=lambda trained: apply_masks(trained, masks),
    )
    return train(training, stage_context.device, stage_context.monitor)
