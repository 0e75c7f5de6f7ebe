"""Stage 3 from Python: prune and quantize students."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdpipe import datasets
from kdpipe.arguments import as_folder, as_run_options, as_settings, shown
from kdpipe.pipeline import steps
from kdpipe.results import CompressedResult, Result, StudentResult
from kdpipe.runs import CallbackLike, RunOptions, isolated
from kdpipe.stages.compress.artifacts.load import rebuild
from kdpipe.stages.compress.compress import CompressConfig, dry_run
from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.quantize_student import QuantizeConfig
from kdpipe.stages.distillation.student_config import DISTILLED, student_folder
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.models.build import GivenModel
from kdpipe.stages.training.job_dir import JobDir, read_json_file
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.student_job import StudentJob, claim_compression
from kdpipe.students import Store, store_places

Settings = Mapping[str, Any]

ELSEWHERE = {
    **{field.name: f"it in prune_train={{{field.name!r}: ...}} or quantize_train" for field in fields(TrainConfig)},
    "steps": "prune= and int8=",
    "quantize": "it as int8={...}",
    "ratio": "prune=",
    "scheme": "int8={'scheme': ...}",
    "seeds": "the student of each seed",
}
"""Keys that are no further options of `compress`."""


@isolated
def compress(
    student: StudentResult,
    dataset: Any = None,
    store: Store | None = None,
    *,
    prune: float | Settings | None = 0.5,
    int8: bool | Settings = True,
    prune_train: Settings | None = None,
    quantize_train: Settings | None = None,
    baselines: bool = False,
    folder: str | Path | None = None,
    device: str | torch.device = "auto",
    num_workers: int | None = None,
    progress: bool = True,
    callbacks: CallbackLike | Sequence[CallbackLike] | None = None,
    **options: Any,
) -> CompressedResult:
    """Prune and quantize a distilled student, fine-tuning it from its stores; export and check the files.

    The networks are written to `compressed/` in the student's run folder, which `report` shows; those of further calls
    with other settings to `compressed-DIGEST/` beside it. In its folder a stopped call resumes.

    Args:
        student: The result of `train_student`.
        dataset: The training images; by default those of the student's training.
        store: The store to fine-tune from; by default those of the student's training.
        prune: The share to remove, or keys of a recipe's `compress.prune` section, such as
            {"ratio": 0.5, "budget": "macs"}; None prunes nothing.
        int8: Whether to quantize to INT8, or keys of `compress.quantize`, such as {"scheme": "int4"}.
        prune_train: Keys of `compress.prune_train`, the fine-tuning after pruning: `epochs`, `lr`, ...
        quantize_train: Keys of `compress.quantize_train`, the fine-tuning while quantized.
        baselines: Whether to make the networks that show what the teacher contributes, too.
        folder: Another folder for the networks.
        device: auto, cpu, cuda, cuda:N, or a torch.device.
        num_workers: Processes that decode images that are not in memory.
        progress: Whether to print progress to stderr.
        callbacks: What observes the trainings: `Callback` objects, or names such as "csv" and "wandb".
        **options: Further keys of a recipe's `compress` section: `opset`, `latency_rounds`, ...

    Raises:
        ModelError: The student cannot be pruned, quantized or exported, or a file disagrees with it.
        FingerprintMismatch: The folder holds a compression with other settings.
    """
    return _compress(
        student,
        _job(student, dataset, store),
        _config(prune, int8, prune_train, quantize_train, {"baselines": baselines, **options}),
        as_run_options(None, device, num_workers, progress, callbacks),
        folder,
    )


@isolated
def prune(
    student: StudentResult,
    dataset: Any = None,
    store: Store | None = None,
    *,
    ratio: float = 0.5,
    train: Settings | None = None,
    folder: str | Path | None = None,
    device: str | torch.device = "auto",
    num_workers: int | None = None,
    progress: bool = True,
    callbacks: CallbackLike | Sequence[CallbackLike] | None = None,
    **settings: Any,
) -> CompressedResult:
    """Prune a distilled student and fine-tune it from its stores, without quantization.

    Args:
        student: The result of `train_student`.
        dataset: As in `compress`.
        store: As in `compress`.
        ratio: The share to remove of what `budget` counts.
        train: Keys of `compress.prune_train`, the fine-tuning.
        folder: As in `compress`.
        device: auto, cpu, cuda, cuda:N, or a torch.device.
        num_workers: Processes that decode images that are not in memory.
        progress: Whether to print progress to stderr.
        callbacks: What observes the trainings: `Callback` objects, or names such as "csv" and "wandb".
        **settings: Further keys of a recipe's `compress.prune` section: `kind`, `budget`, `importance`, `exclude`, ...
    """
    config = _config({"ratio": ratio, **settings}, False, as_settings("train", train), None, {"baselines": False})
    run_options = as_run_options(None, device, num_workers, progress, callbacks)
    return _compress(student, _job(student, dataset, store), config, run_options, folder)


@isolated
def quantize(
    student: StudentResult,
    dataset: Any = None,
    store: Store | None = None,
    *,
    train: Settings | None = None,
    folder: str | Path | None = None,
    device: str | torch.device = "auto",
    num_workers: int | None = None,
    progress: bool = True,
    callbacks: CallbackLike | Sequence[CallbackLike] | None = None,
    **settings: Any,
) -> CompressedResult:
    """Quantize a distilled student and fine-tune it from its stores, without pruning.

    Args:
        student: The result of `train_student`.
        dataset: As in `compress`.
        store: As in `compress`.
        train: Keys of `compress.quantize_train`, the fine-tuning.
        folder: As in `compress`.
        device: auto, cpu, cuda, cuda:N, or a torch.device.
        num_workers: Processes that decode images that are not in memory.
        progress: Whether to print progress to stderr.
        callbacks: What observes the trainings: `Callback` objects, or names such as "csv" and "wandb".
        **settings: Keys of a recipe's `compress.quantize` section: `scheme`, `exclude`, ...
    """
    config = _config(None, settings, None, as_settings("train", train), {"baselines": False})
    run_options = as_run_options(None, device, num_workers, progress, callbacks)
    return _compress(student, _job(student, dataset, store), config, run_options, folder)


def _job(student: StudentResult, dataset: Any, store: Store | None) -> StudentJob:
    if not isinstance(student, StudentResult):
        raise RecipeError(f"compress needs the result of train_student, not {type(student).__name__}.")
    job = student.job
    if not job.losses:
        raise RecipeError("compress needs a student that was distilled from a store: this one was trained alone.")
    if dataset is not None:
        job = replace(job, train_set=datasets.as_image_set(dataset, "train"))
    return job if store is None else replace(job, places=store_places(store))


def _config(
    prune: float | Settings | None,
    int8: bool | Settings,
    prune_train: Settings | None,
    quantize_train: Settings | None,
    options: Settings,
) -> CompressConfig:
    """Return the recipe's `compress` section; what is not given has its defaults."""
    sections: dict[str, Any] = {}
    names: list[str] = []
    if prune not in (None, 0):  # nor False
        names.append("prune")
        sections["prune"] = PruneConfig(**_pruning(prune))
    if int8 is not None and int8 is not False:
        if int8 is not True and not isinstance(int8, Mapping):
            raise RecipeError(f"int8 is {shown(int8)}: give True, False, or settings such as {{'scheme': 'int4'}}.")
        names.append("quantize")
        sections["quantize"] = QuantizeConfig(**({} if int8 is True else int8))
    defaults = CompressConfig()
    for name, settings in (("prune_train", prune_train), ("quantize_train", quantize_train)):
        sections[name] = replace(getattr(defaults, name), **as_settings(name, settings))
    return CompressConfig(**{"steps": tuple(names), **sections, **as_settings("compress", options, ELSEWHERE)})


def _pruning(prune: Any) -> Settings:
    if isinstance(prune, Mapping):
        return prune
    if isinstance(prune, bool) or not isinstance(prune, numbers.Real):
        raise RecipeError(f"prune is {shown(prune)}: give the share to remove, such as 0.5, settings, or None.")
    return {"ratio": float(prune)}


def _compress(
    student: StudentResult,
    job: StudentJob,
    config: CompressConfig,
    run_options: RunOptions,
    folder: str | Path | None,
) -> CompressedResult:
    context = replace(job.context(run_options), run_dir=job.run)
    if student.folder != student_folder(student.job.run, DISTILLED, student.job.seed).path:  # a cohort's member
        config = replace(config, student=str(student.folder / "model.safetensors"))
    dry_run(config, job.config, job.losses, context)
    spec = job.open_stores(context)
    assert spec is not None, "_job refuses students without losses"
    with run_options.open(job.run, context) as opened:
        root = claim_compression(job, student.job, config, None if folder is None else as_folder("folder", folder))
        name = (read_json_file(job.run / "recipe.json") or {}).get("name", job.run.name)
        figures, card = steps.compress_student(config, job.config, job.seed, spec, opened, name=name, root=root)
    networks = {kind: Result(found, JobDir(root / f"{kind}-seed{job.seed}").path) for kind, found in figures.items()}
    assert card is not None, "the last step exports"
    given = job.config.model.module if isinstance(job.config.model, GivenModel) else None
    load = partial(rebuild, trust_python=True, given=given)  # the code that this process has just run
    return CompressedResult(networks, Path(card["folder"]), card, config.kinds[-1], load, job.run)
