"""Stage 3 from Python: prune and quantize students."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdpipe import datasets
from kdpipe.pipeline import steps
from kdpipe.results import CompressedResult, Result, StudentResult
from kdpipe.runs import CallbackLike, RunOptions, isolated, write_run_recipe
from kdpipe.stages.compress.artifacts.load import rebuild
from kdpipe.stages.compress.compress import CompressConfig, compressed_root, dry_run
from kdpipe.stages.compress.pruning.prune import PruneConfig
from kdpipe.stages.compress.quantize_student import QuantizeConfig
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.models.build import GivenModel
from kdpipe.stages.training.job_dir import JobDir, read_json_file
from kdpipe.student_job import StudentJob
from kdpipe.students import Store, store_places

Settings = Mapping[str, Any]


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
    device: str | torch.device = "auto",
    num_workers: int | None = None,
    progress: bool = True,
    callbacks: Sequence[CallbackLike] = (),
    **options: Any,
) -> CompressedResult:
    """Prune and quantize a distilled student, fine-tuning it from its stores; export and check the files.

    The networks are written to `compressed/` in the student's run folder, where a stopped call resumes.

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
        _job(student, dataset, store),
        _config(prune, int8, prune_train, quantize_train, {"baselines": baselines, **options}),
        RunOptions(student.job.run, device, num_workers, progress, callbacks),
    )


@isolated
def prune(
    student: StudentResult,
    dataset: Any = None,
    store: Store | None = None,
    *,
    ratio: float = 0.5,
    train: Settings | None = None,
    device: str | torch.device = "auto",
    num_workers: int | None = None,
    progress: bool = True,
    callbacks: Sequence[CallbackLike] = (),
    **settings: Any,
) -> CompressedResult:
    """Prune a distilled student and fine-tune it from its stores, without quantization.

    Args:
        student: The result of `train_student`.
        dataset: As in `compress`.
        store: As in `compress`.
        ratio: The share to remove of what `budget` counts.
        train: Keys of `compress.prune_train`, the fine-tuning.
        device: auto, cpu, cuda, cuda:N, or a torch.device.
        num_workers: Processes that decode images that are not in memory.
        progress: Whether to print progress to stderr.
        callbacks: What observes the trainings: `Callback` objects, or names such as "csv" and "wandb".
        **settings: Further keys of a recipe's `compress.prune` section: `budget`, `importance`, `exclude`, ...
    """
    config = _config({"ratio": ratio, **settings}, False, train, None, {"baselines": False})
    return _compress(
        _job(student, dataset, store), config, RunOptions(student.job.run, device, num_workers, progress, callbacks)
    )


@isolated
def quantize(
    student: StudentResult,
    dataset: Any = None,
    store: Store | None = None,
    *,
    train: Settings | None = None,
    device: str | torch.device = "auto",
    num_workers: int | None = None,
    progress: bool = True,
    callbacks: Sequence[CallbackLike] = (),
    **settings: Any,
) -> CompressedResult:
    """Quantize a distilled student and fine-tune it from its stores, without pruning.

    Args:
        student: The result of `train_student`.
        dataset: As in `compress`.
        store: As in `compress`.
        train: Keys of `compress.quantize_train`, the fine-tuning.
        device: auto, cpu, cuda, cuda:N, or a torch.device.
        num_workers: Processes that decode images that are not in memory.
        progress: Whether to print progress to stderr.
        callbacks: What observes the trainings: `Callback` objects, or names such as "csv" and "wandb".
        **settings: Keys of a recipe's `compress.quantize` section: `scheme`, `exclude`, ...
    """
    config = _config(None, settings or True, None, train, {"baselines": False})
    return _compress(
        _job(student, dataset, store), config, RunOptions(student.job.run, device, num_workers, progress, callbacks)
    )


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
    if prune:
        names.append("prune")
        sections["prune"] = PruneConfig(**(prune if isinstance(prune, Mapping) else {"ratio": float(prune)}))
    if int8:
        names.append("quantize")
        sections["quantize"] = QuantizeConfig(**(int8 if isinstance(int8, Mapping) else {}))
    defaults = CompressConfig()
    if prune_train is not None:
        sections["prune_train"] = replace(defaults.prune_train, **prune_train)
    if quantize_train is not None:
        sections["quantize_train"] = replace(defaults.quantize_train, **quantize_train)
    return CompressConfig(**{"steps": tuple(names), **sections, **options})


def _compress(job: StudentJob, config: CompressConfig, run_options: RunOptions) -> CompressedResult:
    context = replace(job.context(run_options), run_dir=job.run)
    dry_run(config, job.config, context)
    spec = job.open_stores(context)
    assert spec is not None, "_job refuses students without losses"
    with run_options.open(job.run, context) as opened:
        name = (read_json_file(job.run / "recipe.json") or {}).get("name", job.run.name)
        figures, card = steps.compress_student(config, job.config, job.seed, spec, opened, name=name)
        write_run_recipe(job.run, {"compress": asdict(config)})
    root = compressed_root(job.run, config)
    networks = {kind: Result(found, JobDir(root / f"{kind}-seed{job.seed}").path) for kind, found in figures.items()}
    assert card is not None, "the last step exports"
    given = job.config.model.module if isinstance(job.config.model, GivenModel) else None
    load = partial(rebuild, trust_python=True, given=given)  # the code that this process has just run
    return CompressedResult(networks, Path(card["folder"]), card, load)
