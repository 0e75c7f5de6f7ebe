"""The same student taught in several ways from the same stores, and what a step of each costs: `kdpipe compare`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from stages.config import section
from stages.job_folder import JobFolder, read_json, write_json
from stages.losses.terms import LossConfig, student_layers
from stages.optim import TrainConfig
from stages.schedules import Amount
from stages.setup import Setup
from stages.teaching import Teaching
from stages.train_student import Seat, StudentConfig, build_lesson, fresh_student, train_student
from stages.training import Job, step_walls
from stages.watch import Event
from store.format.identity import sha256_of

NUM_STEPS = 8
"""Steps of which a turn consists when costs are measured."""

NUM_TURNS = 5


ALONE = "alone"
"""The student without a teacher, with which all others are compared."""

COST = "cost.json"


def _free(name: str) -> str:
    if name in (ALONE, "teacher", COST):
        raise ValueError(f"{name!r} is taken: give the way another name")
    return name


WayName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"), AfterValidator(_free)]


@section
class CompareEntry:
    """One way of teaching: the losses, and what it has otherwise than `student`. Without losses there is no teacher."""

    distill: tuple[LossConfig, ...] = ()
    hard_label_weight: Amount | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None

    def __post_init__(self) -> None:
        if self.hard_label_weight is not None and not self.distill:
            raise ValueError("hard_label_weight is beside losses, and there are none: leave it out, or give distill")


@dataclass(frozen=True)
class Way:
    """An entry under its name, with the student's section as it has it; no teaching where it has no losses."""

    name: str
    student: StudentConfig
    teaching: Teaching | None

    @property
    def digest(self) -> str:
        """Of what decides what a step of it costs."""
        teaching = self.teaching.to_json() if self.teaching else None
        return sha256_of({"student": asdict(self.student), "teaching": teaching})

    @property
    def losses(self) -> tuple[Any, ...]:
        return tuple(self.teaching.losses) if self.teaching else ()


def student_of(entry: CompareEntry, student: StudentConfig) -> StudentConfig:
    """The student's section as an entry has it."""
    if entry.hard_label_weight is not None:
        student = replace(student, hard_label_weight=entry.hard_label_weight)
    return student if entry.label_smoothing is None else replace(student, label_smoothing=entry.label_smoothing)


def train_way(way: Way, seed: int, setup: Setup) -> dict[str, Any]:
    """The figures of one student; it is trained if it is not yet."""
    folder = JobFolder(setup.run / "compare" / way.name / f"seed{seed}")
    seat = Seat(folder, f"{way.name}, seed {seed}", with_onnx=False)
    return train_student(way.student, seed, way.teaching, setup, seat=seat)


def measure_costs(ways: Sequence[Way], setup: Setup) -> dict[str, dict[str, float]]:
    """Milliseconds of a training step of each way, and their ratio to those of the first: medians over turns that all
    ways take one after the other, so that what else the machine does hits them alike. Measured once for a run folder.
    """
    record = setup.run / "compare" / COST
    made_from = {way.name: way.digest for way in ways}
    processes = setup.processes
    held = processes.once(lambda: read_json(record) or {})
    known: Any = held.get("costs")
    if held.get("made_from") == made_from and _are_costs(known, made_from):
        return dict(known)
    jobs = [_job(way, setup) for way in ways]
    walls: dict[str, list[float]] = {way.name: [] for way in ways}
    for turn in range(NUM_TURNS + 1):
        for number, (way, job) in enumerate(zip(ways, jobs, strict=True)):
            processes.check(setup.watch)
            taken_s = step_walls(job, setup.device, NUM_STEPS)
            if turn:  # the first one warms up
                walls[way.name].append(statistics.median(taken_s))
            done = turn * len(ways) + number + 1
            setup.watch.report(Event("compare", "cost of a step", done, (NUM_TURNS + 1) * len(ways), "turn"))
    walls = processes.share(walls)
    first = walls[ways[0].name]
    costs = {
        name: {
            "step_ms": round(1000 * statistics.median(own), 3),
            "ratio": round(statistics.median([one / base for one, base in zip(own, first, strict=True)]), 3),
        }
        for name, own in walls.items()
    }
    processes.once(lambda: write_json(record, {"made_from": made_from, "costs": costs}))
    return costs


def _are_costs(costs: Any, ways: Iterable[str]) -> bool:
    """Whether a record has what was measured of each way; what is damaged is measured again."""
    if not isinstance(costs, dict) or not all(isinstance(costs.get(name), dict) for name in ways):
        return False
    return all(isinstance(costs[name].get(key), float | int) for name in ways for key in ("step_ms", "ratio"))


def _job(way: Way, setup: Setup) -> Job:
    """A job of the way's, as far as steps need one."""
    seed = way.student.seeds[0]
    network = fresh_student(way.student, seed, setup, way.losses)
    teaching = way.teaching.main if way.teaching else None
    lesson = build_lesson(network, teaching, seed, setup, label_smoothing=way.student.label_smoothing)
    layers = student_layers(teaching.losses) if teaching else ()
    config: TrainConfig = way.student.train
    name, folder, processes = way.name, JobFolder(Path()), setup.processes
    return Job("compare", name, network.model, lesson, None, config, seed, folder, layers, processes=processes)
