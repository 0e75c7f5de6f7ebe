"""`kdpipe compare`: train the same student in several variants from the same stores, and measure the cost of a step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field

from kdpipe.stages.config import KindName, section
from kdpipe.stages.context import StageContext
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.student_config import ALONE, StudentConfig
from kdpipe.stages.distillation.task_builder import build_student, build_task, label_settings
from kdpipe.stages.losses.registry import AnyLoss
from kdpipe.stages.losses.schedules import Scheduled
from kdpipe.stages.runtime.distributed import ProcessGroup
from kdpipe.stages.runtime.events import ProgressEvent, RunMonitor
from kdpipe.stages.training.job import TrainJob
from kdpipe.stages.training.job_dir import JobDir, read_json_file, write_json_file
from kdpipe.stages.training.loop import time_steps
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.store.format.identity import sha256_of

NUM_STEPS = 8
"""Steps of each variant in a turn when costs are measured."""

NUM_TURNS = 5

COST = "cost.json"


def _free(name: str) -> str:
    if name in (ALONE, "teacher", COST):
        raise ValueError(f"{name!r} is reserved: choose another name")
    return name


VariantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"), AfterValidator(_free)]


@section
class CompareEntry:
    """Configuration of a variant: its losses and overrides of `student`. Without losses there is no teacher."""

    distill: tuple[AnyLoss, ...] = ()
    hard_label_weight: Scheduled | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    hard_label_views: tuple[KindName, ...] | None = None

    def __post_init__(self) -> None:
        if self.hard_label_weight is not None and not self.distill:
            raise ValueError("hard_label_weight needs losses beside it: leave it out, or set distill")


@dataclass(frozen=True)
class Variant:
    """A named variant with its student configuration; `spec` is None without losses."""

    name: str
    student: StudentConfig
    spec: DistillationSpec | None

    @property
    def digest(self) -> str:
        """The digest of everything that can change the cost of a step."""
        spec = self.spec.to_json() if self.spec else None
        student = {
            key: value for key, value in asdict(self.student).items() if key not in ("baseline", "export", "heads")
        }
        for key in ("image_size", "hard_label_views"):  # costs that were measured before there were these keys
            if not student[key]:
                del student[key]
        return sha256_of({"student": student, "distillation": spec})

    @property
    def losses(self) -> tuple[Any, ...]:
        return tuple(self.spec.losses) if self.spec else ()


def with_overrides(entry: CompareEntry, student: StudentConfig) -> StudentConfig:
    """Return the student's configuration with the overrides of an entry."""
    keys = ("hard_label_weight", "label_smoothing", "hard_label_views")
    changes: dict[str, Any] = {key: getattr(entry, key) for key in keys if getattr(entry, key) is not None}
    return replace(student, **changes)


def measure_costs(
    variants: Sequence[Variant],
    build: Callable[[Variant], TrainJob],
    record: Path,
    *,
    device: torch.device,
    monitor: RunMonitor,
    process_group: ProcessGroup,
) -> dict[str, dict[str, float]]:
    """Measure the milliseconds of a training step of each variant, and their ratio to the first variant's.

    Both are medians over turns; in each turn all variants run one after the other, so that other load on the machine
    affects them equally. `build` makes a variant's job; the result is saved in the file `record` and reused.
    """
    made_from = {variant.name: variant.digest for variant in variants}
    saved = process_group.on_main(lambda: read_json_file(record) or {})
    costs: Any = saved.get("costs")
    if saved.get("made_from") == made_from and _are_costs(costs, made_from):
        return dict(costs)
    jobs = [build(variant) for variant in variants]
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for turn in range(NUM_TURNS + 1):
        for number, (variant, job) in enumerate(zip(variants, jobs, strict=True)):
            process_group.check_stop(monitor)
            turn_s = time_steps(job, device, NUM_STEPS)
            if turn:  # the first one is a warm-up
                times[variant.name].append(statistics.median(turn_s))
            done = turn * len(variants) + number + 1
            monitor.report(ProgressEvent("compare", "cost of a step", done, (NUM_TURNS + 1) * len(variants), "turn"))
    shared: dict[str, list[float]] = process_group.broadcast_object(times)
    first = shared[variants[0].name]
    measured = {
        name: {
            "step_ms": round(1000 * statistics.median(own), 3),
            "ratio": round(statistics.median([one / base for one, base in zip(own, first, strict=True)]), 3),
        }
        for name, own in shared.items()
    }
    process_group.on_main(lambda: write_json_file(record, {"made_from": made_from, "costs": measured}))
    return measured


def _are_costs(costs: Any, variants: Iterable[str]) -> bool:
    """Return whether a saved record has valid costs of each variant; damaged ones are measured again."""
    if not isinstance(costs, dict) or not all(isinstance(costs.get(name), dict) for name in variants):
        return False
    return all(isinstance(costs[name].get(key), float | int) for name in variants for key in ("step_ms", "ratio"))


def build_step_job(variant: Variant, context: StageContext) -> TrainJob:
    """Build the job of a variant, only for running steps."""
    seed, context = variant.student.seeds[0], variant.student.context(context)
    network = build_student(variant.student, seed, context, variant.spec)
    spec = variant.spec.without_hint_losses if variant.spec else None
    task = build_task(network, spec, seed, context, **label_settings(variant.student))
    layers = spec.student_layers if spec else ()
    config: TrainConfig = variant.student.train
    name, folder, process_group = variant.name, JobDir(Path()), context.process_group
    return TrainJob(
        "compare", name, network.model, task, None, config, seed, folder, layers, process_group=process_group
    )
