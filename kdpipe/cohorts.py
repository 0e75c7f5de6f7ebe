"""Cohorts from Python: train students that teach each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdpipe import models
from kdpipe.arguments import LossLike, Scaling, as_list, as_losses, as_run_options, as_settings
from kdpipe.results import StudentResult, TeacherResult
from kdpipe.runs import CallbackLike, isolated, write_run_recipe
from kdpipe.stages.cohort import train as cohorts
from kdpipe.stages.cohort.config import CohortConfig, CohortMember
from kdpipe.stages.cohort.exchange import CohortPlan
from kdpipe.stages.cohort.network import build_cohort, member_seed
from kdpipe.stages.evaluation.main_metric import deciding, main_value
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.views.config import Views
from kdpipe.students import OPTIONS, Store, as_student_job

ARGUMENTS = {"members": "members=", "method": "method=", "distill": "peer_losses=", "with_teacher": "a store"}
"""Keys of a recipe's `cohort` section that are arguments."""


@dataclass(frozen=True, eq=False)
class CohortResult:
    """The results of students that taught each other.

    Attributes:
        members: Each of them, as a student of `train_student`.
        ensemble: Their ensemble; its `model` can be the teacher of `cache_teacher`.
    """

    members: Sequence[StudentResult]
    ensemble: TeacherResult

    @property
    def best(self) -> StudentResult:
        """The best member on the validation images, or without any on the test images."""
        return max(self.members, key=lambda member: main_value(deciding(member.figures)))

    def __repr__(self) -> str:
        members = "; ".join(map(repr, self.members))
        return f"CohortResult({members}; ensemble {self.ensemble!r})"


@isolated
def train_cohort(
    model: str | nn.Module | Sequence[str | nn.Module],
    dataset: Any,
    store: Store | Sequence[Store] | None = None,
    *,
    test: Any,
    validation: Any = None,
    members: int = 2,
    method: str = "dml",
    peer_losses: LossLike | Sequence[LossLike] | None = None,
    losses: LossLike | Sequence[LossLike] | None = None,
    hard_label_weight: Scheduled = 0.1,
    cohort: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    normalize: Scaling | None = None,
    views: Views | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    run: str | Path | None = None,
    device: str | torch.device = "auto",
    num_workers: int | None = None,
    progress: bool = True,
    callbacks: CallbackLike | Sequence[CallbackLike] | None = None,
    **train: Any,
) -> CohortResult:
    """Train students that teach each other, of one network or of several; a stored teacher may take part.

    A training that was stopped resumes in its folder; of a finished one the results are returned.

    Args:
        model: The name of a network, of which there are `members`, or a list of names and network objects.
        dataset: The training images.
        store: Stores that each member learns from, too, as in `train_student`; by default none.
        test: The test images.
        validation: Images that decide in place of the test images.
        members: The number of members, 2 to 8, where there is one network.
        method: "dml", "kdcl", "one" or "codistillation".
        peer_losses: Further losses by which each member learns from each of the others.
        losses: The losses from the stores, by default KD.
        hard_label_weight: The weight of the cross entropy with the labels beside a store; without one it is 1.
        cohort: Further keys of a recipe's `cohort` section: `combine`, `temperature`, `weight`, `branch_at`, ...
        model_args: Arguments of a network given by name, such as {"width": 6}; for a list, of all of them.
        normalize: As in `train_student`.
        views: Views of the images; with a store they are the store's.
        seed: Decides initial weights, order of the samples, and dropout.
        options: Further keys of a recipe's `student` section.
        run: The run folder; by default one in `runs/`, named after a digest of all inputs.
        device: auto, cpu, cuda, cuda:N, or a torch.device.
        num_workers: Processes that decode images that are not in memory.
        progress: Whether to print progress to stderr.
        callbacks: What observes the training: `Callback` objects, or names such as "csv" and "wandb".
        **train: Keys of a recipe's `train` section: `epochs`, `batch_size`, `lr`, ...

    Raises:
        FingerprintMismatch: A store, or the folder, belongs to other inputs.
        KdpipeError: An input does not fit.
    """
    run_options = as_run_options(run, device, num_workers, progress, callbacks)
    networks = [models.model_config(one, model_args if isinstance(one, str) else None) for one in as_list(model)]
    job = as_student_job(
        networks[0],
        dataset,
        store,
        test=test,
        validation=validation,
        losses=losses,
        hard_label_weight=hard_label_weight,
        normalize=normalize,
        views=views,
        seed=seed,
        options=options,
        train=TrainConfig(**as_settings("train_cohort", train, {"seeds": OPTIONS["seeds"]})),
    )
    config = CohortConfig(
        method=method,  # type: ignore[arg-type]  # checked there
        members=members if len(networks) == 1 else tuple(CohortMember(model=one) for one in networks),
        distill=as_losses(peer_losses),
        with_teacher=bool(job.places),
        **as_settings("cohort", cohort, ARGUMENTS),
    )
    seed = job.seed
    jobs = [
        replace(job, config=replace(job.config, model=one), seed=member_seed(seed, number))
        for number, one in enumerate(config.models(job.config.model))
    ]
    context = job.context(run_options)
    opened = [own.open_stores(context) for own in jobs]
    plan = CohortPlan(config, job.config, [spec for spec in opened if spec is not None])
    cohorts.check_cohort(config, job.config, context)
    built = build_cohort(config, job.config, seed, context)
    folder = run_options.folder("cohort", cohorts.cohort_fingerprint(plan, seed, built, context))
    with run_options.open(folder, context) as begun:
        figures = cohorts.train_cohort(plan, seed, begun)
        if begun.process_group.is_main:
            write_run_recipe(folder, job.sections())
    ensemble = cohorts.ensemble_folder(folder, seed)
    network = built.joint.model
    network.load_state_dict(load_tensors(ensemble.model)[0])
    return CohortResult(
        [
            StudentResult(own, cohorts.member_folder(folder, number, seed).path, replace(jobs[number], run=folder))
            for number, own in enumerate(figures["members"])
        ],
        TeacherResult(figures["ensemble"], ensemble.path, models.remembering(built.joint).model.eval()),
    )
