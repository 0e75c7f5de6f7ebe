"""Search: try settings of the student's training from one store, and compare the best ones on the test images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdpipe.pipeline.commands.search.best import BEST
from kdpipe.pipeline.commands.search.final import compare_winner
from kdpipe.pipeline.commands.search.results import folder_of, write_results
from kdpipe.pipeline.commands.search.study import open_study, require_optuna
from kdpipe.pipeline.commands.search.trials import Trials
from kdpipe.pipeline.commands.variants.compare import prepare_store
from kdpipe.pipeline.commands.variants.trainings import alone_at
from kdpipe.pipeline.recipe.load import Recipe, recipe_json
from kdpipe.pipeline.recipe.search.space import SearchSpace
from kdpipe.pipeline.report.printing import full_report
from kdpipe.pipeline.report.search import final_table, trials_table, value_text
from kdpipe.pipeline.report.variants import RESULTS
from kdpipe.pipeline.run import Run
from kdpipe.pipeline.terminal.output import console, printable
from kdpipe.pipeline.terminal.tables import print_short_table
from kdpipe.stages.errors import ANOTHER_RUN, NotFiniteError, RecipeError
from kdpipe.stages.training.job_dir import read_json_file, write_json_file
from kdpipe.store import FingerprintMismatch, differences, exclusive, read_store_manifest

EPOCHS = "student.train.epochs"

LATER_KEYS = ("trials", "keep")
"""Keys of the section that may change: a search goes on with more trials."""


def run_search(run: Run) -> dict[str, Any]:
    """Try all trials, then train the winner over seeds; several processes that run the same command share the work.

    Returns:
        The record of the search.
    """
    space, folder = run.recipe.space, folder_of(run.folder)
    if space is None:
        raise RecipeError(
            f"the recipe {run.recipe.name} has nothing to search: add a section [search.space], such as "
            "distill.0.temperature = { low = 1, high = 20, log = true }, or search.preset = 'temperature-and-alpha'."
        )
    require_optuna()
    with alone_at(run, folder / ".teacher.lock"):
        prepare_store(run, "search")
    epochs = {one.key: max(one.choices) for one in space.parameters}.get(EPOCHS, run.recipe.student.train.epochs)
    with exclusive(folder, folder / ".study.lock", check=run.monitor.check):
        _require_same(run, space)
        search = open_study(folder, run.recipe.name, run.recipe.search, space, epochs)
        write_results(search)
    trials = Trials(run, search)
    trials.work()
    if not search.trials("COMPLETE"):
        raise NotFiniteError(
            f"none of the {len(search.trials())} trials was completed: their reasons are in {folder / 'results.json'}; "
            "try a lower learning rate, or lower weights of the losses."
        )
    return compare_winner(run, trials)


def _require_same(run: Run, space: SearchSpace) -> None:
    """Record what the trials depend on, or require that it is what was recorded.

    Raises:
        FingerprintMismatch: The folder holds a search of something else.
    """
    path = folder_of(run.folder) / "search.json"
    wanted = json.loads(json.dumps(_inputs(run, run.recipe, space), default=str))
    stored = read_json_file(path)
    if stored is None:
        write_json_file(path, wanted)
    elif found := differences(stored, wanted):
        advice = f"Choose {ANOTHER_RUN}, or delete that folder to search from the start."
        raise FingerprintMismatch(f"the search in {path.parent}", found, advice)


def _inputs(run: Run, recipe: Recipe, space: SearchSpace) -> dict[str, Any]:
    record, context = recipe_json(recipe), run.context
    no_matter = ("seeds", "baseline", "export", "target_loading")
    student = {key: value for key, value in record["student"].items() if key not in no_matter}
    teacher = read_store_manifest(run.store).identity.teacher if run.stores == [run.store] else {}
    return {
        "search": {key: value for key, value in record["search"].items() if key not in LATER_KEYS},
        "space": [vars(one) for one in space.parameters],
        "student": student,
        "distill": record["distill"],
        **({"compress": record["compress"]} if recipe.search.compress else {}),
        "teacher": teacher.get("weights_sha256"),
        "data": context.training_identity(),
        "validation": context.deciding.test_identity(),
        "views": context.student_views(),
    }


def print_search(recipe: str, folder: Path, found: Mapping[str, Any]) -> None:
    """Print the best trials, and the winner beside what it is compared with, to stdout."""
    out = console()
    print_short_table(out, trials_table(recipe, found), full_report(folder))
    print_short_table(out, final_table(recipe, found), full_report(folder))
    if failed := found["counts"].get("fail"):
        out.print(f"{failed} trials failed; {folder_of(folder) / RESULTS} has the reasons.", soft_wrap=True)
    settings = found["trials"][found["final"]["winner"]]["settings"]
    chosen = ", ".join(f"{key} = {value_text(value)}" for key, value in settings.items())
    out.print(printable(f"best on the validation images: {chosen}"), soft_wrap=True)
    out.print(
        printable(f"as a recipe: {folder / BEST}; its teacher and store: --workspace {folder.parent}"), soft_wrap=True
    )
