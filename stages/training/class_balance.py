"""Class weights and balanced sampling of a training on classes of unequal size."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdpipe.stages.data.image_set import require_classes
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.optim import TrainConfig


def with_class_balance(job: TrainJob) -> TrainJob:
    """Return the job with the class weights and the sampler of its configuration in its task.

    Raises:
        RecipeError: They do not fit the data set, or how its targets are read.
    """
    config, task = job.config, job.task
    if task.label_smoothing:
        require_classes(task.loader.dataset, "label_smoothing")
    if config.class_weights is None and config.sampler == "shuffle":
        return job
    dataset, balanced = task.loader.dataset, config.sampler == "balanced"
    require_classes(dataset, "train.sampler = 'balanced'" if balanced else "train.class_weights")
    if balanced and task.targets is not None and task.targets.slabs is not None:
        raise RecipeError(
            "train.sampler = 'balanced' reads targets in any order, but they are streamed: raise "
            "student.target_loading.memory_bytes or mapped_bytes, or use train.class_weights."
        )
    if balanced and task.distillation is not None and not dataset.is_labeled:
        raise RecipeError(
            "train.sampler = 'balanced' needs the label of every training sample, and some are unlabeled: use "
            "train.class_weights."
        )
    losses = task.distillation.configs if task.distillation else {}
    if balanced and (contrastive := [name for name, loss in losses.items() if loss.num_negatives]):
        raise RecipeError(
            f"train.sampler = 'balanced' repeats samples, of which {contrastive[0]} keeps one embedding each: use "
            "train.class_weights."
        )
    weights = class_weights(config, dataset.labels, dataset.num_classes)
    weights = weights if weights is None else weights.to(task.loader.device)
    return replace(job, task=replace(task, balanced=balanced, class_weights=weights))


def class_weights(config: TrainConfig, labels: Tensor, num_classes: int) -> Tensor | None:
    """Return the factors of the classes, float32 [num_classes], of mean 1 over labels int64 [N]; None if all are 1.

    Raises:
        RecipeError: There is not one for each class, or those of all samples are 0.
    """
    given = config.class_weights
    if given is None:
        return None
    sizes = torch.bincount(labels[labels >= 0], minlength=num_classes).double()
    if given == "balanced":
        raw = 1 / sizes.clamp_min(1)
    elif len(given) != num_classes:
        raise RecipeError(f"train.class_weights has {len(given)} numbers for {num_classes} classes: give one for each.")
    else:
        raw = torch.tensor(given, dtype=torch.float64)
    mean = (raw * sizes).sum() / sizes.sum().clamp_min(1)
    if mean == 0:
        raise RecipeError("train.class_weights are 0 for all training samples: set at least one above 0.")
    return (raw / mean).float()
