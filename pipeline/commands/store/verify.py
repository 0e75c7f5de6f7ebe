"""`kdpipe store verify` and `repair`: what they do and say. Checking alone needs no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pipeline.session.signals import stop_when_asked
from pipeline.terminal.exit_codes import DONE_IN_PART, FAILED
from pipeline.terminal.output import printable
from pipeline.terminal.progress import reporter
from stages.watch import Watch
from store.verify import Verdict, verify_store

if TYPE_CHECKING:
    from pipeline.run import Walk
    from stages.recompute import Recomputed


def require_recipe(recipe: Path, overrides: Sequence[str]) -> None:
    """Raise RecipeError for a recipe that cannot be taken."""
    from pipeline.recipe.load import load_recipe

    load_recipe(recipe, overrides, os.environ)


def verify(path: Path, as_json: bool) -> Verdict:
    """Check the store at `path` under signals and progress."""
    with stop_when_asked() as should_stop, reporter(as_json) as report_event:
        return verify_store(path, Watch(report_event, should_stop).counter("verify", "check", "unit"))


def ask_teacher(path: Path, walk: Walk, num_rows: int, seed: int) -> Recomputed:
    """Compare some samples with what the recipe's teacher says: training samples, or those of its test store."""
    from stages.recompute import recompute
    from stages.teacher_on_test import test_place, test_setup
    from stages.train_teacher import load_teacher

    teacher = load_teacher(walk.recipe.teacher, walk.recipe.seed, walk.setup)
    of_test = path.absolute() == Path(test_place(walk.store))
    return recompute(path, teacher, test_setup(walk.setup) if of_test else walk.setup, num_rows, seed)


def repair(walk: Walk) -> dict[Path, tuple[Verdict, Verdict, int]]:
    """Repair the recipe's stores, of the training and the test images: what was found in each, what is left, and the
    number of units computed.
    """
    from stages.repair import repair as repair_store
    from stages.teacher_on_test import repair_test, test_place
    from stages.train_teacher import load_teacher

    teacher, config = load_teacher(walk.recipe.teacher, walk.recipe.seed, walk.setup), walk.recipe.cache
    layers, beside = list(walk.wanted_by(teacher)), Path(test_place(walk.store))
    done = {walk.store: repair_store(config, walk.store, teacher, layers, walk.setup)}
    return done | ({beside: repair_test(config, beside, teacher, walk.setup)} if beside.exists() else {})


def print_verdict(path: Path, verdict: Verdict, recomputed: Recomputed | None = None) -> None:
    """For people, on stdout: everything that was found, a line each, and then the sum."""
    lines = [f"damaged      {fault}" for fault in verdict.damaged]
    lines += [f"missing      {unit}: {', '.join(names)}" for unit, names in verdict.missing]
    lines += [f"leftover     {key} (belongs to nothing, does no harm)" for key in verdict.leftovers]
    if recomputed is not None:
        lines += [
            f"differs      sample {one.sample_id}, view {one.view}, {one.array}: {one.error:.3g} times the tolerance"
            for one in recomputed.differing
        ]
        lines.append(
            f"{path}: the teacher was asked for {recomputed.num_rows} samples; the largest difference is "
            f"{recomputed.largest_error:.2g} times the tolerance"
        )
    lines.append(
        f"{path}: {verdict.num_units_whole} of {verdict.num_units} units are whole, {verdict.num_bytes:,} bytes were "
        f"checked, {_sum(verdict)}"
    )
    print("\n".join(map(printable, lines)))  # noqa: T201


def repair_json(repaired: dict[Path, tuple[Verdict, Verdict, int]]) -> dict[str, Any]:
    """For machines: the training store's figures, and under `test_store` those of the test images', if any."""
    documents = [
        {
            "path": str(path),
            "found": [fault.to_json() for fault in found.damaged],
            "num_units_computed": num_computed,
            **left.to_json(),
        }
        for path, (found, left, num_computed) in repaired.items()
    ]
    return documents[0] | ({"test_store": documents[1]} if len(documents) > 1 else {})


def print_repair(path: Path, found: Verdict, left: Verdict, num_computed: int) -> None:
    """The same after a repair."""
    for fault in found.damaged:
        print(printable(f"found        {fault}"))  # noqa: T201
    print(f"{path}: {_faults(found)} found, {num_computed} units computed again")  # noqa: T201
    print_verdict(path, left)


def leave(verdict: Verdict, recomputed: Recomputed | None = None) -> None:
    """End the command with the exit status that the verdict asks for."""
    if verdict.damaged or (recomputed is not None and recomputed.differing):
        raise typer.Exit(FAILED)
    if verdict.missing:
        raise typer.Exit(DONE_IN_PART)


def _sum(verdict: Verdict) -> str:
    if verdict.damaged:
        return f"{_faults(verdict)}: run `kdpipe store repair RECIPE`"
    if verdict.missing:
        return "nothing is damaged: run `kdpipe cache-teacher` to compute what is missing"
    return "all is right"


def _faults(verdict: Verdict) -> str:
    return "1 fault" if len(verdict.damaged) == 1 else f"{len(verdict.damaged)} faults"
