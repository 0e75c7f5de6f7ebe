"""Measure test accuracy and disk use for 1, 2, 4, 8, 16 cached views and one per epoch.

    uv run python benchmarks/view_budget.py [--runs DIR] [--set KEY=VALUE ...]

One store of recipes/fashion.toml, with a view for each of the student's epochs; then, by the command line,
students from its first V views, and students with fresh augmentation every epoch and targets of one view; each with and
without a teacher on the same views. A killed run resumes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from kdpipe.stages.training.job_dir import read_json_file
from kdpipe.store import open_store, store_bytes

RECIPE = Path(__file__).parent.parent / "recipes" / "fashion.toml"

NUM_EPOCHS = 48

FRESH = "targets of 1 view, fresh augmentation"

ROWS: dict[str, dict[str, Any]] = {
    **{f"{count} view{'s' if count > 1 else ''}": {"views.num_views": count} for count in (1, 2, 4, 8, 16)},
    f"{NUM_EPOCHS}: one per epoch": {"views.num_views": NUM_EPOCHS},
    FRESH: {"views.num_views": 1, "views.replay": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/view-budget"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    runs, overrides = arguments.runs, [*arguments.set, f"student.train.epochs={NUM_EPOCHS}"]
    for command in ("train-teacher", "cache-teacher"):
        kdpipe(command, runs / "store", [*overrides, f"views.num_views={NUM_EPOCHS}"])
    place = runs / "store" / "store.zarr"
    store = open_store(place)
    print("| views stored | disk, bytes per sample | student without teacher % | student distilled % |")
    print("|---|---|---|---|")
    for number, (row, changes) in enumerate(ROWS.items()):
        settings = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        run = runs / f"students-{number}"
        kdpipe("train-student", run, [*overrides, f'student.stores=["{place}"]', *settings])
        views = store.manifest.layout.units(range(changes["views.num_views"]))
        taken = store_bytes(store.manifest, views) / store.num_samples
        print(f"| {row} | {taken:,.0f} | {accuracy(run, 'alone')} | {accuracy(run, 'distilled')} |", flush=True)
    teacher = read_json_file(runs / "store" / "teacher" / "result.json")
    print(f"teacher {100 * teacher['accuracy']:.2f} %")


def kdpipe(command: str, run: Path, overrides: list[str]) -> None:
    settings = [part for override in overrides for part in ("--set", override)]
    arguments = [
        sys.executable,
        "-c",
        "from kdpipe.pipeline.main import main; main()",
        command,
        str(RECIPE),
        "--run",
        str(run),
        *settings,
    ]
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)


def accuracy(run: Path, kind: str) -> str:
    found = [read_json_file(path) for path in sorted((run / "students").glob(f"{kind}-seed*/result.json"))]
    percents = [100 * result["accuracy"] for result in found]
    return f"{statistics.mean(percents):.2f} ± {statistics.stdev(percents):.2f}"


if __name__ == "__main__":
    main()
