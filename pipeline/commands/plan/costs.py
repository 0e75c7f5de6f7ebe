"""The cost of each stage of a run: the networks that it makes, those that exist, and the time of the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.pipeline.commands.plan.existing import unfinished_compressions
from kdpipe.pipeline.commands.plan.probe import Probe, Seconds
from kdpipe.pipeline.run import Run
from kdpipe.stages.compress.compress import fine_tunings
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.student_config import ALONE, DISTILLED
from kdpipe.stages.workspace import shown
from kdpipe.store import KdpipeError


@dataclass(frozen=True)
class StageCost:
    """What a stage, or one kind of its networks, costs.

    Attributes:
        stage: The command.
        what: What it makes.
        count: How many.
        num_done: How many of them are finished, here or in another run.
        seconds: The time of the others; None if it is not known.
        note: Where the finished ones are, or why the time is not known.
    """

    stage: str
    what: str
    count: int
    num_done: int
    seconds: Seconds | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        seconds = self.seconds.to_json() if self.seconds else None
        return {
            "stage": self.stage,
            "what": self.what,
            "count": self.count,
            "num_done": self.num_done,
            "wall_s": seconds,
            "note": self.note,
        }


NOTHING = Seconds(0, 0)


def total(costs: Sequence[StageCost]) -> list[float] | None:
    """Return the ends of the estimate of all stages; None if one is not known."""
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    return sum(known, NOTHING).to_json() if len(known) == len(costs) else None


def student_costs(probe: Probe, students: dict[tuple[str, int], Path]) -> Iterator[StageCost]:
    """Yield the costs of the students, alone and distilled, and of their compression."""
    recipe, run = probe.run.recipe, probe.run
    compressions = list(unfinished_compressions(run)) if recipe.student.export and recipe.distill else []
    spec, why = None, ""
    kinds = [ALONE] * recipe.student.baseline + [DISTILLED] * bool(recipe.distill)
    if recipe.distill and (compressions or any((DISTILLED, seed) not in students for seed in recipe.student.seeds)):
        spec, why = _opened(probe)
    for kind in kinds:
        done = [where for (each, _), where in students.items() if each == kind]
        count, seconds = len(recipe.student.seeds), None
        if kind == ALONE or spec is not None or len(done) == count:
            each = NOTHING if len(done) == count else probe.student_training(spec if kind == DISTILLED else None)
            seconds = each.times(count - len(done))
        note = _places(run, done) if seconds else why
        yield StageCost("train-student", f"students, {kind}", count, len(done), seconds, note)
    if recipe.student.export and recipe.distill and recipe.compress.steps:
        yield _compression(probe, compressions, spec, why)


def _opened(probe: Probe) -> tuple[DistillationSpec | None, str]:
    """Return the losses on targets of the sample, and why that is not possible."""
    try:
        return probe.open_distillation(), "the stores of the students are not on this machine"
    except KdpipeError as error:
        return None, str(error)


def _compression(
    probe: Probe, compressions: Sequence[tuple[str, int]], spec: DistillationSpec | None, why: str
) -> StageCost:
    config = probe.run.recipe.compress
    jobs = fine_tunings(config)
    count = len(jobs) * len(probe.run.recipe.student.seeds)
    seconds = NOTHING if not compressions or spec is not None else None
    if seconds is not None:
        times: dict[tuple[bool, bool], Seconds] = {}
        for kind, _ in compressions:
            train, distilled = jobs[kind]
            ways = (distilled, not kind.startswith("pruned"))
            if train.epochs and ways not in times:
                losses = spec if distilled else None
                times[ways] = probe.fine_tuning(train, losses, quantized=ways[1]).times(1 / train.epochs)
            seconds += times[ways].times(train.epochs) if train.epochs else NOTHING
        kept = 1 - config.prune.ratio if config.prunes and config.prune.kind == "channels" else 1
        seconds = Seconds(seconds.low * kept, seconds.high)
    note = "without exports and latencies" if seconds else why
    return StageCost(
        "compress", f"networks ({', '.join(config.steps)})", count, count - len(compressions), seconds, note
    )


def _places(run: Run, done: Sequence[Path]) -> str:
    """Return where finished jobs are that are not in the run folder."""
    others = dict.fromkeys(shown(where) for where in done if where != run.folder)
    return f"of {', '.join(others)}" if others else ""
