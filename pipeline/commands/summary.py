"""Print the results of a single stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdpipe.pipeline.commands.store.info import describe_encoding_error
from kdpipe.pipeline.report.formatting import interval_text
from kdpipe.pipeline.report.networks import network_entries
from kdpipe.pipeline.terminal.output import printable
from kdpipe.stages.evaluation.correct_images import outcome_of
from kdpipe.stages.evaluation.intervals import accuracy_interval
from kdpipe.stages.evaluation.main_metric import main_percent, metric_of
from kdpipe.stages.training.job_dir import read_json_file
from kdpipe.store.format.identity import describe_computation


def print_summary(command: str, run: Path, results: dict[str, Any]) -> None:
    """Print the figures and the paths of the files to stdout."""
    for line in (*_lines(results, names_of(run)), f"{command} is done: {run}"):
        print(printable(line))  # noqa: T201


def names_of(run: Path) -> dict[str, str]:
    """Return the names of a run's networks by kind, as its tables have them."""
    recipe = read_json_file(run / "recipe.json")
    return {entry.kind: entry.name for entry in network_entries(recipe, run)} if recipe else {}


def _lines(results: dict[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    if teacher := results.get("teacher"):
        yield _figures("teacher", teacher)
    if store := results.get("store"):
        yield (
            f"store: {store['num_views']} views of {store['num_samples']:,} samples, {store['store_bytes']:,} bytes, "
            f"{', '.join(store['arrays'])}: {store['path']}"
        )
        for name, error in store["fidelity"].items():
            yield f"{name} relative to the teacher's outputs: {describe_encoding_error(error)}"
        if store["compute"] or store["trial"]:
            yield f"the teacher was computed in {describe_computation(store['compute'], store['trial'])}"
        if store["num_units_missing"]:
            part = f"{store['part']} is done; " if store["part"] else ""
            yield f"{part}{store['num_units_missing']} units of the store are still missing"
    for kind, students in results.get("students", {}).items():
        for number, student in enumerate(students):
            yield _figures(f"student {kind}, number {number}", student)
    yield from _compressed(results, names)


def _compressed(results: dict[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    for number, pair in enumerate(results.get("compressed", [])):
        for kind, figures in pair.items():
            yield _figures(f"{names.get(kind, kind)}, number {number}", figures)
    for pair in results.get("compressed", [])[:1]:  # the same for every seed
        if excluded := pair.get("pruned", {}).get("excluded"):
            yield f"not pruned: {_first_five([f'{path} ({reason})' for path, reason in excluded.items()])}"
    for card in results.get("artifacts", [])[:1]:
        if floats := next(
            (row["float_nodes"] for row in reversed(card["networks"].values()) if row["float_nodes"]), ()
        ):
            yield f"not quantized: {_first_five(floats)}"
    for card in results.get("artifacts", []):
        best = card["ranking"][0]
        yield f"exported: {', '.join(card['ranking'])}: {card['folder']}"
        accuracy = f"{main_percent(card['networks'][best]):.2f} %"
        yield f"recommended: {names.get(best, best)} ({accuracy}): {card['reason']}"


def _first_five(texts: list[str]) -> str:
    more = f" and {len(texts) - 5} more (card.json)" if len(texts) > 5 else ""
    return ", ".join(texts[:5]) + more


def _figures(name: str, figures: dict[str, Any]) -> str:
    interval = accuracy_interval([outcome_of(figures)])
    sure = f" (95 % interval {interval_text(interval.in_percent)})" if interval else ""
    reached = f"test {metric_of(figures).title} {main_percent(figures):.2f} %{sure}"
    return f"{name}: {reached}, {figures['num_parameters']:,} parameters"
