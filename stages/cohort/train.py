"""Train a cohort: the joint network in the folder of the ensemble, then each member as a student of its own.

The joint network is trained by the loop of all trainings, so that checkpoints, processes, precision and micro-batches
are as everywhere. Its folder has the checkpoint until all members, and last the ensemble, are evaluated and saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kdpipe.stages.cohort.config import CohortConfig, check_peer_losses, check_teacher_losses, require_one_kind
from kdpipe.stages.cohort.exchange import CohortPlan, build_task
from kdpipe.stages.cohort.network import Cohort, build_cohort, evaluation_of, renewal
from kdpipe.stages.config import config_fingerprint
from kdpipe.stages.context import StageContext
from kdpipe.stages.data.image_set import require_classes, require_labels
from kdpipe.stages.distillation.adapters import save_adapters
from kdpipe.stages.distillation.spec import schedule_json
from kdpipe.stages.distillation.student_config import StudentConfig, student_folder
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.training.finalize import finalize
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir
from kdpipe.stages.training.loop import train
from kdpipe.stages.training.preflight import try_network

STAGE = "cohort"


def member_folder(run: Path, number: int, seed: int) -> JobDir:
    """Return the folder of a member, counted from 0; folders and tables count from 1."""
    return student_folder(run, f"cohort-{number + 1}", seed)


def ensemble_folder(run: Path, seed: int) -> JobDir:
    """Return the folder of the ensemble, in which the joint network is trained."""
    return student_folder(run, "cohort-ensemble", seed)


def check_cohort(config: CohortConfig, student: StudentConfig, context: StageContext) -> None:
    """Raise RecipeError, or DataError, for a cohort that cannot be trained on this data and these views."""
    check_peer_losses(config.distill, config)
    require_classes(context.train_set, "[cohort]")
    views, count = context.views, config.num_members
    require_one_kind(views)
    if not config.with_teacher:
        require_labels(context.train_set)
    if student.train.compile:
        raise RecipeError("student.train.compile = true: cohorts are not compiled; set it to false.")
    if student.train.optimizer == "dot":
        raise RecipeError(
            "student.train.optimizer = 'dot': its two momenta are for labels and losses of one student, and "
            "a cohort has those of all members: set it to 'sgd'."
        )
    if student.heads.layers:
        raise RecipeError("student.heads: the members of a cohort learn with their outputs: leave it out.")
    if not config.own_views:
        return
    if views.mix is not None:
        raise RecipeError(
            "cohort.method = 'kdcl' gives each member a view of its own, and [views.mix] gives each view another "
            "label: remove one of them."
        )
    if views.replay and views.num_views < count:
        raise RecipeError(
            f"cohort.method = 'kdcl' gives each of the {count} members a view of its own, and views.num_views is "
            f"{views.num_views}: set it to {count} or more."
        )
    if not context.train_set.is_labeled:
        raise RecipeError(
            "cohort.method = 'kdcl' combines logits by the labels, and some training images have none: use another "
            "method, or label them."
        )
    if config.combine == "general" and (context.validation_set is None or not context.validation_set.has_labels):
        raise RecipeError(
            "cohort.combine = 'general' weighs the members by their errors on validation images: set "
            "data.validation_share, or choose another way to combine."
        )


def try_cohort(plan: CohortPlan, context: StageContext) -> None:
    """Build a first cohort with its losses, so that errors come before any training. Raises like `train_cohort`."""
    config, student = plan.config, plan.student
    context = context.resized(student.image_size)
    check_cohort(config, student, context)
    check_teacher_losses(plan.specs[0].losses if plan.specs else (), config)
    context.process_group.require_shares(student.train.batch_size, context.train_set.num_samples)
    build_task(plan, build_cohort(config, student, student.seeds[0], context), student.seeds[0], context)


def train_cohort(plan: CohortPlan, seed: int, context: StageContext) -> dict[str, Any]:
    """Train the members of a seed together, evaluate and export each, and their ensemble.

    Args:
        plan: What it is trained by.
        seed: The seed.
        context: The data and views.

    Returns:
        The results of the `members`, in their order, and of the `ensemble`.

    Raises:
        RecipeError: The cohort cannot be trained on this data, these views or stores.
        ModelError: A network cannot be divided into branches, or lacks a layer.
    """
    config, student = plan.config, plan.student
    context, group = context.resized(student.image_size), context.process_group
    check_cohort(config, student, context)
    check_teacher_losses(plan.specs[0].losses if plan.specs else (), config)
    group.require_shares(student.train.batch_size, context.train_set.num_samples)
    cohort = build_cohort(config, student, seed, context)
    inputs = cohort_fingerprint(plan, seed, cohort, context)
    folders = _folders(context.run_dir, config.num_members, seed)
    if (done := group.on_main(partial(_begin, folders, inputs))) is None:
        return _train_cohort(plan, seed, cohort, context)
    return _results(done)


def _folders(run: Path, count: int, seed: int) -> list[JobDir]:
    """Return the folders of all members, and last that of the ensemble."""
    return [*(member_folder(run, number, seed) for number in range(count)), ensemble_folder(run, seed)]


def _begin(folders: Sequence[JobDir], inputs: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Claim the folders, and return the results of all if these are finished, else None."""
    names = [*map(str, range(1, len(folders))), "ensemble"]
    for name, folder in zip(names, folders, strict=True):
        folder.begin({**inputs, "result_of": name})
    results = [result for folder in folders if (result := folder.result()) is not None]
    return results if len(results) == len(folders) else None


def _results(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"members": list(found[:-1]), "ensemble": found[-1]}


def cohort_fingerprint(plan: CohortPlan, seed: int, cohort: Cohort, context: StageContext) -> dict[str, Any]:
    """Return everything that determines the networks of a cohort."""
    config, student = plan.config, plan.student
    temperature, weight = schedule_json(config.softened), schedule_json(config.weight)
    return {
        "cohort": {**config.to_json(), "temperature": temperature, "weight": weight},
        "peer_losses": [dict(config_fingerprint(loss)) for loss in config.distill],
        "starts_from": [member.identity for member in cohort.members],
        "train": config_fingerprint(student.train),
        "seed": seed,
        "data": context.training_identity(),
        "test": context.test_identity(),
        "views": context.student_views(),
        "label_smoothing": student.label_smoothing,
        "distillation": [spec.to_json() for spec in plan.specs],
    }


def _train_cohort(plan: CohortPlan, seed: int, cohort: Cohort, context: StageContext) -> dict[str, Any]:
    config, student, joint, group = plan.config, plan.student, cohort.joint, context.process_group
    job_dir = ensemble_folder(context.run_dir, seed)
    if not group.on_main(job_dir.checkpoint.exists):
        for member in {str(one.architecture): one for one in cohort.members}.values():
            try_network(member, student.train, role="student", device=context.device, exports=student.export)
    task = build_task(plan, cohort, seed, context)
    validation = context.validation(joint.normalize)
    job = TrainJob(
        stage=STAGE,
        name=f"cohort of {config.num_members}, seed {seed}",
        model=joint.model,
        task=task,
        test=context.deciding.evaluation(joint.normalize),
        config=student.train,
        seed=seed,
        job_dir=job_dir,
        student_layers=task.hooked,
        on_epoch=renewal(joint.model, task.exchange, validation, group),
        process_group=group,
        evaluate=evaluation_of(joint.model),
    )
    history = train(job, context.device, context.monitor)
    finish = partial(finalize, test=context.evaluation(joint.normalize), process_group=group, validation=validation)
    results = []
    for number in range(config.num_members):
        folder, own = member_folder(context.run_dir, number, seed), member_history(history, number)
        if (done := group.on_main(folder.result)) is not None:  # before this job was stopped
            results.append(done)
            continue
        group.on_main(partial(folder.write_metrics, own))
        stored = task.exchange.stored[number] if plan.specs else None
        more = group.on_main(partial(save_adapters, folder, stored)) | {"cohort": config.method}
        results.append(finish(folder, cohort.trained(number), own, with_onnx=student.export, more=more))
    warn = partial(_warn_of_no_export, context)
    ensemble = finish(
        job_dir, joint, history, with_onnx=student.export, on_no_export=warn, more={"cohort": config.method}
    )
    return _results([*results, ensemble])


def _warn_of_no_export(context: StageContext, reason: str) -> None:
    context.monitor.warn(STAGE, f"there is no ONNX file of the ensemble: {reason}")


def member_history(history: Sequence[Mapping[str, Any]], number: int) -> list[dict[str, Any]]:
    """Return the metrics of each epoch of one member, from those of the joint network."""
    end = f"_{number}"
    return [
        {
            **{key: value for key, value in line.items() if key != "members"},
            **line["members"][number],
            "losses": {name.removesuffix(end): loss for name, loss in line["losses"].items() if name.endswith(end)},
        }
        for line in history
    ]
