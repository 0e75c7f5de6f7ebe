"""List the networks of a run: their names in tables, their looks in charts, and the folders of their jobs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.stages.compress.names import compressed_name, network_name
from kdpipe.stages.compress.targets import SCHEMES, quantized_grids, targets_of
from kdpipe.store.format.schema import ATTRIBUTE
from kdpipe.store.fs.checksums import read_intact_json

MADE_IN_PYTHON = ".made-in-python"
"""The file that marks run folders of the Python API, whose recipe grows with the calls."""


@dataclass(frozen=True)
class Style:
    """How a network is drawn. color: a CSS variable of the page; marker and line: as matplotlib names them."""

    color: str
    marker: str
    line: str = "solid"


STYLES = {
    "teacher": Style("teacher", "s", "dotted"),
    "alone": Style("alone", "^", "dashed"),
    "student": Style("student", "o"),
    "pruned": Style("pruned", "D"),
    "quantized": Style("quantized", "P"),
    "unpruned": Style("unpruned", "v"),
    "ptq": Style("calibrated", "X"),
    "member": Style("student", "<"),
    "ensemble": Style("teacher", ">"),
}


@dataclass(frozen=True)
class NetworkEntry:
    """One network over its seeds. kind: its name in paths; timed_as: the kind whose file takes the same time."""

    name: str
    kind: str
    jobs: list[Path]
    timed_as: str


def compressed_folder(recipe: Mapping[str, Any], run: Path) -> Path:
    """Return the folder of the compressed students."""
    return run / compressed_name(recipe["compress"].get("student"))


def network_entries(recipe: Mapping[str, Any], run: Path, root: Path | None = None) -> list[NetworkEntry]:
    """Return the networks that a resolved recipe makes, in the order of the tables; `root` has the compressed ones.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: If `recipe` is not a recipe.
    """
    seeds = _seeds(recipe)
    root, given = root or compressed_folder(recipe, run), recipe["compress"].get("student")

    def students(kind: str) -> list[Path]:
        return [run / "students" / f"{kind}-seed{seed}" for seed in seeds]

    teacher = teacher_job(recipe, run)
    entries = [] if teacher is None else [NetworkEntry("teacher", "teacher", [teacher], "teacher")]
    if given is None:
        if recipe["student"].get("baseline", True):
            entries.append(NetworkEntry("student alone", "alone", students("alone"), "student"))
        entries.append(NetworkEntry("student distilled", "student", students("distilled"), "student"))
    else:
        entries.append(NetworkEntry("student given", "student", [root / "given"], "student"))
    if not recipe["student"].get("export", True):  # nothing is compressed then
        return entries
    prunes = "prune" in recipe["compress"]["steps"]
    for kind, timed_as in _compressed(recipe["compress"]):
        jobs = [root / f"{kind}-seed{seed}" for seed in seeds]
        entries.append(NetworkEntry(network_name(kind, prunes=prunes), kind, jobs, timed_as))
    return entries


def cohort_entries(recipe: Mapping[str, Any], run: Path) -> list[NetworkEntry]:
    """Return the members of the recipe's cohort, and their ensemble; none without a cohort."""
    if not (cohort := recipe.get("cohort")):
        return []
    members, seeds = cohort["members"], _seeds(recipe)
    count = members if isinstance(members, int) else len(members)
    kinds = {f"member {number}": f"cohort-{number}" for number in range(1, count + 1)}
    return [
        NetworkEntry(name, name.split()[0], [run / "students" / f"{kind}-seed{seed}" for seed in seeds], kind)
        for name, kind in {**kinds, "ensemble": "cohort-ensemble"}.items()
    ]


def teacher_job(recipe: Mapping[str, Any], run: Path) -> Path | None:
    """Return the folder of the run's teacher: its own, or that beside the first store, if it was made elsewhere.

    None if the teacher of a store that was made elsewhere is not known here.
    """
    own = run / "teacher"
    named = [*recipe["student"].get("stores", ()), recipe.get("cache", {}).get("store")]
    elsewhere = next((str(store) for store in named if store), None)
    if elsewhere is None or own.exists():
        return own
    store = Path(elsewhere)  # of a URL nothing is found
    stored = (read_intact_json(store / "zarr.json") or {}).get("attributes", {}).get(ATTRIBUTE, {})
    result = read_intact_json(store.parent / "teacher" / "result.json") or {}
    weights = result.get("identity", {}).get("weights_sha256")
    return store.parent / "teacher" if weights and weights == stored.get("teacher", {}).get("weights_sha256") else None


def num_training_images(jobs: Iterable[Path]) -> int | None:
    """Return the number of training images that the first of these jobs with such a record has; None if none has."""
    for job in jobs:
        data = (read_intact_json(job / "job.json") or {}).get("data")
        if isinstance(data, dict) and type(size := data.get("num_samples")) is int:
            return size
    return None


def _seeds(recipe: Mapping[str, Any]) -> list[int]:
    seeds = recipe["student"]["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds):
        raise ValueError("student.seeds is not a list of seeds")
    return seeds


def _compressed(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield kind and timed_as of each compressed network."""
    steps, baselines = list(config["steps"]), config.get("baselines", False)
    scheme = config.get("quantize", {}).get("scheme", "int8")
    if scheme not in SCHEMES:  # it becomes part of paths
        raise ValueError(f"compress.quantize.scheme is none of {', '.join(SCHEMES)}")
    prunes = "prune" in steps
    if prunes:
        yield "pruned", "pruned"
        if baselines:
            yield "pruned-alone", "pruned"
    if "quantize" not in steps:
        return
    if baselines and prunes:
        unpruned = f"{scheme}-unpruned"
        yield from ((unpruned, unpruned), (f"{scheme}-ptq", unpruned), (f"{unpruned}-alone", unpruned))
    yield from ((kind, kind) for kind in quantized_grids(scheme, targets_of(config.get("target", "onnxruntime"))))
    if baselines and not prunes:
        yield f"{scheme}-ptq", scheme
    if baselines:
        yield f"{scheme}-alone", scheme


def style_of(kind: str) -> Style:
    """Return the style of a kind of network; one fine-tuned with hard labels has its counterpart's color, dashed."""
    if kind in STYLES:
        return STYLES[kind]
    first, *variants = kind.split("-")
    is_integer = first in SCHEMES
    base = next((one for one in variants if one in STYLES and one != "alone"), "quantized" if is_integer else "pruned")
    found = STYLES[base]
    return Style(found.color, found.marker, "dashed") if variants[-1:] == ["alone"] else found
