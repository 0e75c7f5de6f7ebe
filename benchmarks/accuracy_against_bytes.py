"""Train students from one teacher's store in several encodings: accuracy against bytes, at equal training.

    uv run python benchmarks/accuracy_against_bytes.py RECIPE [--set KEY=VALUE ...] [--seeds 0 1 2]
        [--temperatures 1 4] [--dir FOLDER] [--picture FILE]

RECIPE needs a data set, views, a teacher and a student; its `[[distill]]` entries are replaced by KD. The teacher is
trained or loaded and cached once, in dense float16; every other store is transcoded from that one, but that of
vectors and the teacher's last layer ("head"), which is cached too, and every student sees the same images in the same
order. A rerun continues. Prints a Markdown table: bytes of a row, and of all of a sample's views; test accuracy of
the last epoch, mean and standard deviation over seeds; and the mean difference from dense float16 at the same
temperature, seed by seed, with its standard error. `--picture` draws accuracy against the bytes of a row.

Rows with fewer views use the first of them again and again; one of these has a temperature that falls from 20 to 2
over the training (Xiao and He 2026, arXiv 2604.18135, reuse pruned labels so). "At T = 1" are the largest logits with
one number for the others: what stores of top-k probabilities have.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = "import sys; from kdpipe.pipeline.entry import main; sys.exit(main())"
DENSE, HEAD = "float16", "head"
STOPPED_EARLY = 75


@dataclass(frozen=True)
class Variant:
    """A store, transcoded with `options`, and the temperature of KD; `num_views` None for all."""

    name: str
    options: tuple[str, ...]
    temperature: float | str
    num_views: int | None = None

    @property
    def label(self) -> str:
        views = "" if self.num_views is None else f", {self.num_views} views"
        return f"{self.name}{views}"

    @property
    def folder(self) -> str:
        kept = "".join(one if one.isalnum() else "-" for one in f"{self.label}-T{self.temperature}")
        return "-".join(part for part in kept.split("-") if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--dir", type=Path, default=Path("runs/bytes"))
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    common = [word for text in [*arguments.set, "cache.dtype=float16"] for word in ("--set", text)]
    common += ["--set", 'distill=[{loss="kd"}]']
    teacher = [str(arguments.recipe), "--run", str(arguments.dir / "teacher"), *common, "--json"]
    kdpipe("train-teacher", *teacher)
    cached = kdpipe("cache-teacher", *teacher)["store"]
    num_classes = kdpipe("store", "info", cached["path"], "--json")["arrays"]["logits"]["row_shape"][0]
    found: dict[tuple[str, float | str], list[float]] = {}
    points: list[tuple[Variant, int, list[float]]] = []
    print("| encoding | T | bytes a row | bytes a sample | accuracy, % | difference from float16, points |")
    print("|---|---:|---:|---:|---:|---:|")
    for variant in variants(num_classes, cached["num_views"], arguments.temperatures):
        store = make_store(arguments, common, variant, cached["path"])
        accuracies = train(arguments, common, variant, store, cached["num_views"])
        if not found:
            alone = train(arguments, common, variant, store, cached["num_views"], kind="alone")
            print(f"| none: the student alone | | 0 | 0 | {with_spread(alone)} | |", flush=True)
        found[variant.label, variant.temperature] = accuracies
        dense = found.get((DENSE, variant.temperature), [])
        size = row_bytes(store)
        points.append((variant, size, accuracies))
        print(table_row(variant, size, cached["num_views"], accuracies, dense), flush=True)
    if arguments.picture:
        draw(points, cached["num_views"], arguments.picture)


def variants(num_classes: int, num_views: int, temperatures: list[float]) -> Iterator[Variant]:
    """Yield dense float16 of each temperature before what is compared with it."""
    kept = [k for k in (5, 10, 20, 50) if 4 * k < 2 * num_classes]
    for value in temperatures:
        yield Variant(DENSE, (), value)
        for name in ("int8", "int4"):
            yield Variant(name, ("--encoding", name), value)
        yield Variant(HEAD, (), value)
        for k in kept:
            span = ("--temperatures", "1", f"{value:g}") if value >= 1 else ("--temperatures", f"{value:g}", "1")
            name = f"top-{k} at T = 1" if value == 1 else f"top-{k} with tail"
            yield Variant(name, ("--top-k", str(k), *span), value)
        for k in [k for k in (12, 25, 50) if value == 1 and 2 * k < num_classes]:
            yield Variant(f"{k} sampled labels", ("--sampled-labels", str(k)), value)
        for few in sorted({max(1, num_views // 4), max(1, num_views // 10)} - {num_views}, reverse=True):
            yield Variant(DENSE, ("--views", str(few)), value, few)
    few = max(1, num_views // 10)
    yield Variant(DENSE, ("--views", str(few)), "20 to 2", few)


def make_store(arguments: argparse.Namespace, common: list[str], variant: Variant, dense: str) -> Path:
    """Transcode the dense store; logits that follow from vectors and a head are cached, with the same teacher."""
    if variant.name == HEAD:
        run = ["--run", str(arguments.dir / HEAD), "--set", f"cache.encoding={HEAD}"]
        return Path(kdpipe("cache-teacher", str(arguments.recipe), *common, *run, "--json")["store"]["path"])
    store = arguments.dir / f"{variant.folder}.zarr"
    kdpipe("store", "transcode", dense, str(store), "--logits-only", *variant.options, "--json")
    return store


def train(
    arguments: argparse.Namespace,
    common: list[str],
    variant: Variant,
    store: Path,
    num_views: int,
    *,
    kind: str = "distilled",
) -> list[float]:
    """Return the accuracies of the students of a kind, by seed."""
    fixed = isinstance(variant.temperature, float)
    temperature = f"{variant.temperature:g}" if fixed else '{start=20.0, end=2.0, shape="linear"}'
    settings = [
        f"student.stores=[{json.dumps(str(store))}]",
        f"views.num_views={variant.num_views or num_views}",
        f'distill=[{{loss="kd", weight=0.9, temperature={temperature}}}]',
        "student.hard_label_weight=0.1",
        f"student.baseline={str(kind == 'alone').lower()}",
        f"student.seeds={arguments.seeds}",
        "student.export=false",
    ]
    words = [word for text in settings for word in ("--set", text)]
    run = str(arguments.dir / variant.folder)
    result = kdpipe("train-student", str(arguments.recipe), "--run", run, *common, *words, "--json")
    return [100 * one["accuracy"] for one in result["students"][kind]]


def row_bytes(store: Path) -> int:
    info = kdpipe("store", "info", str(store), "--json")
    widths = {"float16": 2, "float32": 4, "uint8": 1, "uint16": 2, "uint32": 4}
    return sum(math.prod(one["row_shape"]) * widths[one["dtype"]] for one in info["arrays"].values())


def draw(points: list[tuple[Variant, int, list[float]]], num_views: int, path: Path) -> None:
    """Draw mean accuracy, with the standard error of the mean, against the bytes of a sample, a line a temperature."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, temperature in enumerate(dict.fromkeys(str(variant.temperature) for variant, _, _ in points)):
        own = [one for one in points if str(one[0].temperature) == temperature]
        sizes = [size * (variant.num_views or num_views) for variant, size, _ in own]
        means = [statistics.fmean(values) for _, _, values in own]
        errors = [statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0 for _, _, values in own]
        axes.errorbar(sizes, means, errors, fmt="os^"[number % 3], capsize=3, label=f"T = {temperature}")
        for (variant, _, _), size, mean in zip(own, sizes, means, strict=True):
            axes.annotate(variant.label, (size, mean), xytext=(5, 3), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", xlabel="bytes of a sample, all views", ylabel="test accuracy of the student, %")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def table_row(variant: Variant, size: int, num_views: int, accuracies: list[float], dense: list[float]) -> str:
    differences = [own - other for own, other in zip(accuracies, dense, strict=False)]
    compared = "" if variant.label == DENSE or not differences else with_spread(differences, per_mean=True)
    sample_bytes = size * (variant.num_views or num_views)
    cells = [variant.label, f"{variant.temperature}", f"{size:,}", f"{sample_bytes:,}"]
    return f"| {' | '.join([*cells, with_spread(accuracies), compared])} |"


def with_spread(values: list[float], *, per_mean: bool = False) -> str:
    """Return mean and standard deviation, or the standard error of the mean; one value alone."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    spread = statistics.stdev(values) / (math.sqrt(len(values)) if per_mean else 1)
    return f"{statistics.fmean(values):.2f} ± {spread:.2f}"


def kdpipe(*words: str) -> dict[str, Any]:
    """Run a command and return its JSON document; messages go to stderr."""
    ended = subprocess.run([sys.executable, "-c", COMMAND, *words], stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        what = "was stopped; run this again to continue" if ended.returncode == STOPPED_EARLY else "failed"
        raise SystemExit(f"kdpipe {' '.join(words[:2])} {what} (exit status {ended.returncode}).")
    document: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return document


if __name__ == "__main__":
    main()
