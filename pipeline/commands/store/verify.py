"""Verify and repair target stores. Verification alone needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import typer

from kdpipe.pipeline.session.signals import handle_signals
from kdpipe.pipeline.terminal.exit_codes import DONE_IN_PART, FAILED
from kdpipe.pipeline.terminal.output import printable
from kdpipe.pipeline.terminal.progress import reporter
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.store.check.verify import VerifyReport, verify_store

if TYPE_CHECKING:
    from kdpipe.pipeline.run import Run
    from kdpipe.stages.cache_teacher.recheck import RecheckReport

Repaired = dict[Path, tuple[VerifyReport, VerifyReport, int]]
"""By store: the faults found, the verdict after the repair, and the number of units computed."""


def verify(path: Path, as_json: bool) -> VerifyReport:
    """Check the store at `path`, with signals and progress."""
    with handle_signals() as should_stop, reporter(as_json) as report:
        return verify_store(path, RunMonitor(report, should_stop).counter("verify", "check", "unit"))


def recheck(path: Path, run: Run, num_rows: int, seed: int) -> RecheckReport:
    """Recompute some samples of a store, or of its test store, with the recipe's teacher, and compare."""
    from kdpipe.stages.cache_teacher.recheck import recompute
    from kdpipe.stages.teacher import load_teacher

    teacher = load_teacher(run.recipe.teacher, run.recipe.seed, run.context)
    beside = dict(run.evaluation_stores(run.store).values())
    return recompute(path, teacher, beside.get(path.absolute(), run.context), num_rows, seed)


def repair(run: Run) -> Repaired:
    """Repair the recipe's stores, of the training images and of those that networks are evaluated on."""
    from kdpipe.stages.cache_teacher.repair import repair as repair_store
    from kdpipe.stages.teacher import load_teacher

    teacher, config = load_teacher(run.recipe.teacher, run.recipe.seed, run.context), run.recipe.cache
    layers = list(run.required_features(teacher))
    repaired = {run.store: repair_store(config, run.store, teacher, layers, run.context)}
    for path, images in run.evaluation_stores(run.store).values():
        if path.exists():
            repaired[path] = repair_store(config.for_test, path, teacher, [], images)
    return repaired


def print_verdict(path: Path, verdict: VerifyReport, recomputed: RecheckReport | None = None) -> None:
    """Print every fault, one a line, and a summary to stdout."""
    lines = [f"damaged      {fault}" for fault in verdict.damaged]
    lines += [f"missing      {unit}: {', '.join(names)}" for unit, names in verdict.missing]
    if recomputed is not None:
        lines += [
            f"differs      sample {row.sample_id}, view {row.view}, {row.array}: {row.error:.3g} times the tolerance"
            for row in recomputed.differing
        ]
        lines.append(
            f"{path}: {recomputed.num_rows} samples were recomputed; the largest difference is "
            f"{recomputed.largest_error:.2g} times the tolerance"
        )
    lines.append(
        f"{path}: {verdict.num_units_whole} of {verdict.num_units} units are complete, {verdict.num_bytes:,} bytes "
        f"were checked, {_conclusion(verdict)}"
    )
    print("\n".join(map(printable, lines)))  # noqa: T201


def repair_json(repaired: Repaired) -> dict[str, Any]:
    """Return the results for the training store, and under `test_store` and so on for those beside it."""
    from kdpipe.stages.data.splits import Part
    from kdpipe.stages.targets.open import part_store_path

    first, *others = [
        {
            "path": str(path),
            "found": [fault.to_json() for fault in found.damaged],
            "num_units_computed": num_computed,
            **left.to_json(),
        }
        for path, (found, left, num_computed) in repaired.items()
    ]
    trained, *evaluated = repaired
    parts = {part_store_path(trained, part): part for part in get_args(Part)}
    return first | {f"{parts[path]}_store": other for path, other in zip(evaluated, others, strict=True)}


def print_repair(repaired: Repaired) -> None:
    """Print the faults found, and the verdict after the repair, to stdout."""
    for path, (found, left, num_computed) in repaired.items():
        for fault in found.damaged:
            print(printable(f"found        {fault}"))  # noqa: T201
        print(f"{path}: {_num_faults(found)} found, {num_computed} units recomputed")  # noqa: T201
        print_verdict(path, left)


def exit_for(verdict: VerifyReport, recomputed: RecheckReport | None = None) -> None:
    """Exit with status 1 if anything is damaged or differs, 3 if units are missing; else return."""
    if verdict.damaged or (recomputed is not None and recomputed.differing):
        raise typer.Exit(FAILED)
    if verdict.missing:
        raise typer.Exit(DONE_IN_PART)


def _conclusion(verdict: VerifyReport) -> str:
    if verdict.damaged:
        return f"{_num_faults(verdict)}: run `kdpipe store repair RECIPE`"
    if verdict.missing:
        return "nothing is damaged: run `kdpipe cache-teacher` to compute what is missing"
    return "no faults found"


def _num_faults(verdict: VerifyReport) -> str:
    return "1 fault" if len(verdict.damaged) == 1 else f"{len(verdict.damaged)} faults"
