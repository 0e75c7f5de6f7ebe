"""The cost of each stage of a run: the networks that it makes, those that exist, and the time of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kdpipe.pipeline.commands.plan.existing import unfinished_compressions
from kdpipe.pipeline.commands.plan.probe import Probe, Seconds
from kdpipe.pipeline.commands.search.final import COMPARED
from kdpipe.pipeline.commands.variants.compare import variants_of
from kdpipe.pipeline.commands.variants.sweep import sweep_trainings
from kdpipe.pipeline.commands.variants.trainings import run_of
from kdpipe.pipeline.recipe.load import Recipe
from kdpipe.pipeline.recipe.search.config import EPOCH_PRUNERS
from kdpipe.pipeline.report.variants import RESULTS
from kdpipe.pipeline.run import Run
from kdpipe.stages.cohort.config import CohortConfig
from kdpipe.stages.cohort.train import ensemble_folder
from kdpipe.stages.compress.compress import fine_tunings
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.student_config import ALONE, DISTILLED, StudentConfig
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.models.build import ModelConfig
from kdpipe.stages.training.job_dir import read_json_file
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
    """Yield the costs of the students, alone and distilled, and of their compression; or of a sweep, search, ..."""
    recipe, run = probe.run.recipe, probe.run
    if recipe.points or recipe.space:
        yield from _sweep_costs(probe) if recipe.points else _search_costs(probe)
        return
    if recipe.compare:
        yield from _compare_costs(probe)
    if recipe.cohort:
        yield from _cohort_costs(probe, recipe.cohort)
    compresses = recipe.student.export and recipe.distill and recipe.compress.steps
    compressions = list(unfinished_compressions(run)) if compresses else []
    num_done = {kind: sum(each == kind for each, _ in students) for kind in (ALONE, DISTILLED)}
    count = len(recipe.student.seeds)
    needs_spec = recipe.distill and (compressions or num_done[DISTILLED] < count)
    spec, why = _opened(probe) if needs_spec else (None, "")
    for kind in [ALONE] * recipe.student.baseline + [DISTILLED] * bool(recipe.distill):
        seconds: Seconds | None = NOTHING
        note = _places(run, [where for (each, _), where in students.items() if each == kind])
        if num_left := count - num_done[kind]:
            seconds, note = _measured(partial(_student_time, probe, kind, spec, num_left), why * (kind != ALONE), note)
        yield StageCost("train-student", f"students, {kind}", count, num_done[kind], seconds, note)
    if compresses:
        what, count = f"networks ({', '.join(recipe.compress.steps)})", count * len(fine_tunings(recipe.compress))
        measure = partial(_compression_time, probe, compressions, spec)
        seconds, note = _measured(measure, why)
        yield StageCost("compress", what, count, count - len(compressions), seconds, note)


def _sweep_costs(probe: Probe) -> Iterator[StageCost]:
    """Yield the costs of a sweep's students, which are timed as the recipe's own and scaled by their epochs."""
    run, recipe = probe.run, probe.run.recipe
    spec, why = _opened(probe)
    trainings = list(sweep_trainings(run, recipe.points))
    names = {point.name for point in recipe.points}
    for kind in [ALONE] * recipe.student.baseline + [DISTILLED]:
        own = [one for one in trainings if (one.name in names) == (kind == DISTILLED)]
        left = [one for one in own if one.student_run.job_dir.result() is None]
        share = sum(one.student.train.epochs for one in left) / max(1, recipe.student.train.epochs)
        what = f"students, {len(recipe.points)} settings" if kind == DISTILLED else f"students, {ALONE}"
        seconds, note = _measured(partial(_student_time, probe, kind, spec, share), why * (kind == DISTILLED))
        yield StageCost("sweep", what, len(own), len(own) - len(left), seconds, note)


def _search_costs(probe: Probe) -> Iterator[StageCost]:
    """Yield the costs of a search: of its trials, from pruned as planned to none pruned, and of its comparison."""
    run, recipe, config = probe.run, probe.run.recipe, probe.run.recipe.search
    spec, why = _opened(probe)
    known = read_json_file(run.folder / "search" / RESULTS) or {"counts": {}}
    num_done = sum(known["counts"].get(state, 0) for state in ("complete", "pruned", "fail"))
    num_left = max(0, config.trials - num_done) * len(config.seeds)
    whole, note = _measured(partial(_searched_time, probe, DISTILLED, spec, num_left), why)
    kept = _share_of_epochs(recipe) if config.chosen_pruner in EPOCH_PRUNERS else 1.0
    seconds = whole and Seconds(kept * whole.low, whole.high)
    yield StageCost("search", f"students, {config.trials} trials", num_done + num_left, num_done, seconds, note)
    for kind, count in {ALONE: int(recipe.student.baseline), DISTILLED: len(COMPARED)}.items():
        num_trainings = count * len(recipe.student.seeds)
        measured = partial(_searched_time, probe, kind, spec, num_trainings)
        seconds, note = _measured(measured, why * (kind == DISTILLED))
        if "final" in known:
            seconds, note = NOTHING, ""
        if num_trainings:
            done = num_trainings * ("final" in known)
            yield StageCost("search", f"students, {kind}, at the end", num_trainings, done, seconds, note)


def _share_of_epochs(recipe: Recipe) -> float:
    """Return the share of their epochs that trials take if one of `reduction_factor` goes on at each decision."""
    epochs, kept, least = recipe.student.train.epochs, 1.0, recipe.search.min_epochs
    done, spent = 0, 0.0
    while done < epochs:
        after = min(least, epochs)
        spent, done = spent + kept * (after - done), after
        kept, least = kept / recipe.search.reduction_factor, least * recipe.search.reduction_factor
    return spent / epochs


def _compare_costs(probe: Probe) -> Iterator[StageCost]:
    """Yield the cost of the variants of `kdpipe compare`, each timed; the student alone is train-student's too."""
    run, seconds, notes, num_done = probe.run, Seconds(0, 0), list[str](), 0
    variants = {name: own for name, own in variants_of(run).items() if name != ALONE}
    for name, (losses, student) in variants.items():
        runs = [run_of(run.folder, "compare", name, seed) for seed in student.seeds]
        num_left = sum(one.job_dir.result() is None for one in runs)
        num_done += len(runs) - num_left
        if num_left:
            time, note = _measured(partial(_variant_time, probe, losses, student, num_left))
            seconds += time or NOTHING
            notes += [] if time else [f"{name}: {note}"]
    what, count = f"students, variants ({len(variants)})", len(variants) * len(run.recipe.student.seeds)
    yield StageCost("compare", what, count, num_done, None if notes else seconds, "; ".join(notes[:1]))


def _cohort_costs(probe: Probe, config: CohortConfig) -> Iterator[StageCost]:
    """Yield the costs of cohorts, and of the members' networks alone, but the student's, which is train-student's."""
    run, student = probe.run, probe.run.recipe.student
    spec, why = _opened(probe) if config.with_teacher else (None, "")
    others = {str(model): model for model in config.models(student.model) if model != student.model}
    if others and student.baseline:
        seconds, note = _measured(partial(_time_alone, probe, list(others.values())))
        count = len(others) * len(student.seeds)
        yield StageCost("cohort", "other members, alone", count, 0, seconds and seconds.times(len(student.seeds)), note)
    num_done = sum(ensemble_folder(run.folder, seed).result() is not None for seed in student.seeds)
    seconds, note = NOTHING, ""
    if num_left := len(student.seeds) - num_done:
        seconds, note = _measured(partial(probe.cohort_training, config, spec), why)
        seconds = seconds and seconds.times(num_left)
    what = f"cohorts of {config.num_members}"
    yield StageCost("cohort", what, len(student.seeds), num_done, seconds, note)


def _time_alone(probe: Probe, models: Sequence[ModelConfig]) -> Seconds:
    student = probe.run.recipe.student
    return sum((probe.student_training(None, replace(student, model=model)) for model in models), NOTHING)


def _variant_time(probe: Probe, losses: Sequence[Loss], student: StudentConfig, count: int) -> Seconds:
    spec = probe.open_distillation(losses) if losses else None
    return probe.student_training(spec, student).times(count)


def teacher_cost(probe: Probe, found: Path | None) -> StageCost:
    """Return the cost of the teacher, which is none if it is finished in the run folder `found`."""
    places = _places(probe.run, [found] if found else [])
    seconds, note = (NOTHING, places) if found else _measured(probe.teacher_training)
    return StageCost("train-teacher", "teacher", 1, int(found is not None), seconds, note)


def _measured(measure: Callable[[], Seconds], missing: str = "", note: str = "") -> tuple[Seconds | None, str]:
    """Return the time, and a note; without a time, what is `missing` to measure it, or why that failed."""
    try:
        return (None, missing) if missing else (measure(), note)
    except KdpipeError as error:
        return None, str(error)


def _opened(probe: Probe) -> tuple[DistillationSpec | None, str]:
    """Return the losses on targets of the sample, or why that is not possible."""
    try:
        spec = probe.open_distillation()
    except KdpipeError as error:
        return None, str(error)
    return spec, "" if spec else "the stores of the students are not complete, or not on this machine"


def _student_time(probe: Probe, kind: str, spec: DistillationSpec | None, count: float) -> Seconds:
    return probe.student_training(spec if kind == DISTILLED else None).times(count)


def _searched_time(probe: Probe, kind: str, spec: DistillationSpec | None, count: float) -> Seconds:
    """Return the time of students of a search, which are compressed, too, if the recipe says so."""
    recipe, one = probe.run.recipe, _student_time(probe, kind, spec, 1)
    if recipe.search.compress:
        one += _compression_time(probe, [(made, 0) for made in recipe.compress.kinds[1:]], spec)
    return one.times(count)


def _compression_time(probe: Probe, compressions: Sequence[tuple[str, int]], spec: DistillationSpec | None) -> Seconds:
    """Return the time of fine-tunings: measured on the unpruned student, of which pruned ones take a part."""
    config, seconds = probe.run.recipe.compress, NOTHING
    jobs, of_an_epoch = fine_tunings(config), dict[tuple[bool, bool], Seconds]()
    for kind, _ in compressions:
        train, distilled = jobs[kind]
        way = distilled, not kind.startswith("pruned")
        if train.epochs and way not in of_an_epoch:
            whole = probe.fine_tuning(train, spec if distilled else None, quantized=way[1])
            of_an_epoch[way] = whole.times(1 / train.epochs)
        seconds += of_an_epoch[way].times(train.epochs) if train.epochs else NOTHING
    after = probe.after_compression(compressions)
    kept = 1 - config.prune.ratio if config.prunes and not config.prune.zeroes_weights else 1.0
    return Seconds(seconds.low * kept, seconds.high) + after


def _places(run: Run, done: Sequence[Path]) -> str:
    """Return where finished jobs are that are not in the run folder."""
    others = dict.fromkeys(shown(where) for where in done if where != run.folder)
    return f"of {', '.join(others)}" if others else ""
