"""A training job: a network, its task, and where it reports and saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kdpipe.stages.data.loader.sampling import num_steps
from kdpipe.stages.data.splits import VALIDATION
from kdpipe.stages.evaluation.evaluate import EvalResult, Evaluation, evaluate
from kdpipe.stages.runtime.distributed import SINGLE, ProcessGroup
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.task import TrainingTask


@dataclass(frozen=True)
class TrainJob:
    """A training: a network, its task, and where it reports and saves.

    Attributes:
        stage: The command that reports its progress.
        name: Its name in progress reports.
        model: The network, which is trained in place.
        task: The images, labels, targets and losses.
        test: The evaluation of each epoch, on the validation images if there are any; None where only hints are trained
            and the network does not run to its end.
        config: Epochs, batch size, optimizer and schedule.
        seed: Decides the order of the samples and dropout.
        job_dir: The folder of checkpoint, metrics and results.
        student_layers: The modules of the model whose features are extracted.
        evaluate: How the model is evaluated on `test`.
        on_epoch: Called with model and epoch number before each epoch; it may change only the model's state.
        after_step: Called with the model after each step; it may change only the model's state.
        process_group: The processes that share each batch.
    """

    stage: str
    name: str
    model: nn.Module
    task: TrainingTask
    test: Evaluation | None
    config: TrainConfig
    seed: int
    job_dir: JobDir
    student_layers: Sequence[str] = ()
    on_epoch: Callable[[nn.Module, int], None] = lambda model, epoch: None
    after_step: Callable[[nn.Module], None] = lambda model: None
    process_group: ProcessGroup = SINGLE
    evaluate: Callable[[nn.Module, Evaluation, torch.device], EvalResult] = evaluate

    @property
    def validates(self) -> bool:
        """Whether its epochs are evaluated on validation images, not on the test images."""
        return self.test is not None and self.test.loader.dataset.split == VALIDATION


def num_steps_of(job: TrainJob) -> int:
    """Return the number of steps of an epoch."""
    return num_steps(job.task.num_samples, job.config.batch_size)
