"""`kdpipe compare`: train the same student in several variants from the same stores, and measure the cost of a step."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from kdpipe.stages.config import section
from kdpipe.stages.context import Setup
from kdpipe.stages.distillation.spec import Teaching
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.distillation.task_builder import build_lesson, fresh_student
from kdpipe.stages.losses.distillation import student_layers
from kdpipe.stages.losses.registry import LossConfig
from kdpipe.stages.losses.schedules import Amount
from kdpipe.stages.runtime.events import Event
from kdpipe.stages.train_student.student import StudentRun, train_student
from kdpipe.stages.training.job_dir import JobFolder, read_json, write_json
from kdpipe.stages.training.loop import time_steps
from kdpipe.stages.training.optim import TrainConfig
from kdpipe.stages.training.step import Job
from kdpipe.store.format.identity import sha256_of

NUM_STEPS = 8
"""Steps of each variant in a turn when costs are measured."""

NUM_TURNS = 5

ALONE = "alone"
"""The student without a teacher, the baseline of all variants."""

COST = "cost.json"


def _free(name: str) -> str:
    if name in (ALONE, "teacher", COST):
        raise ValueError(f"{name!r} is reserved: choose another name")
    return name


WayName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"), AfterValidator(_free)]


@section
class CompareEntry:
    """Configuration of a variant: its losses and overrides of `student`. Without losses there is no teacher."""

    distill: tuple[LossConfig, ...] = ()
    hard_label_weight: Amount | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None

    def __post_init__(self) -> None:
        if self.hard_label_weight is not None and not self.distill:
            raise ValueError("hard_label_weight needs losses beside it: leave it out, or set distill")


@dataclass(frozen=True)
class Way:
    """A named variant with its student configuration; `teaching` is None without losses."""

    name: str
    student: StudentConfig
    teaching: Teaching | None

    @property
    def digest(self) -> str:
        """The digest of everything that can change the cost of a step."""
        teaching = self.teaching.to_json() if self.teaching else None
        return sha256_of({"student": asdict(self.student), "teaching": teaching})

    @property
    def losses(self) -> tuple[Any, ...]:
        return tuple(self.teaching.losses) if self.teaching else ()


def student_of(entry: CompareEntry, student: StudentConfig) -> StudentConfig:
    """Return the student's configuration with the overrides of an entry."""
    if entry.hard_label_weight is not None:
        student = replace(student, hard_label_weight=entry.hard_label_weight)
    return student if entry.label_smoothing is None else replace(student, label_smoothing=entry.label_smoothing)


def train_way(way: Way, seed: int, setup: Setup) -> dict[str, Any]:
    """Train one student, unless it is finished, and return its results."""
    folder = JobFolder(setup.run / "compare" / way.name / f"seed{seed}")
    run = StudentRun(folder, f"{way.name}, seed {seed}", with_onnx=False)
    return train_student(way.student, seed, way.teaching, setup, run=run)


def measure_costs(ways: Sequence[Way], setup: Setup) -> dict[str, dict[str, float]]:
    """Measure the milliseconds of a training step of each variant, and their ratio to the first variant's.

    Both are medians over turns; in each turn all variants run one after the other, so that other load on the machine
    affects them equally. The result is saved in the run folder and reused.
    """
    record = setup.run / "compare" / COST
    made_from = {way.name: way.digest for way in ways}
    processes = setup.processes
    saved = processes.once(lambda: read_json(record) or {})
    costs: Any = saved.get("costs")
    if saved.get("made_from") == made_from and _are_costs(costs, made_from):
        return dict(costs)
    jobs = [_job(way, setup) for way in ways]
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    for turn in range(NUM_TURNS + 1):
        for number, (way, job) in enumerate(zip(ways, jobs, strict=True)):
            processes.check(setup.watch)
            turn_s = time_steps(job, setup.device, NUM_STEPS)
            if turn:  # the first one is a warm-up
                times[way.name].append(statistics.median(turn_s))
            done = turn * len(ways) + number + 1
            setup.watch.report(Event("compare", "cost of a step", done, (NUM_TURNS + 1) * len(ways), "turn"))
    shared: dict[str, list[float]] = processes.share(times)
    first = shared[ways[0].name]
    measured = {
        name: {
            "step_ms": round(1000 * statistics.median(own), 3),
            "ratio": round(statistics.median([one / base for one, base in zip(own, first, strict=True)]), 3),
        }
        for name, own in shared.items()
    }
    processes.once(lambda: write_json(record, {"made_from": made_from, "costs": measured}))
    return measured


def _are_costs(costs: Any, ways: Iterable[str]) -> bool:
    """Return whether a saved record has valid costs of each variant; damaged ones are measured again."""
    if not isinstance(costs, dict) or not all(isinstance(costs.get(name), dict) for name in ways):
        return False
    return all(isinstance(costs[name].get(key), float | int) for name in ways for key in ("step_ms", "ratio"))


def _job(way: Way, setup: Setup) -> Job:
    """Build the job of a variant, only for running steps."""
    seed = way.student.seeds[0]
    network = fresh_student(way.student, seed, setup, way.losses)
    teaching = way.teaching.main if way.teaching else None
    lesson = build_lesson(network, teaching, seed, setup, label_smoothing=way.student.label_smoothing)
    layers = student_layers(teaching.losses) if teaching else ()
    config: TrainConfig = way.student.train
    name, folder, processes = way.name, JobFolder(Path()), setup.processes
    return Job("compare", name, network.model, lesson, None, config, seed, folder, layers, processes=processes)
