"""Recipes: a TOML file, one experiment; read strictly, overridden by KDPIPE_ variables and --set, and refused in one
clear sentence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.recipe.layers import Layers, read_layers
from pipeline.recipe.origins import Settings, settings_of
from pipeline.recipe.sentence import faults, first_and_more, one_line
from stages.compare import CompareEntry, WayName
from stages.compress import CompressConfig
from stages.config import Seed, section
from stages.datasets.load import DataConfig
from stages.errors import ModelError, RecipeError, RunError
from stages.job_folder import read_json
from stages.losses.entry import Entry
from stages.losses.terms import LossConfig
from stages.store_plan import CacheConfig
from stages.teaching import check_losses
from stages.train_student import StudentConfig
from stages.train_teacher import TeacherConfig
from stages.views.config import ViewsConfig
from stages.views.renderer import check_views

NOTHING: Mapping[str, str] = MappingProxyType({})


@section
class Recipe:
    """One experiment, from teacher to INT8 student.

    name: also the name of its run folder below `runs/`.
    seed: of the teacher; each student has its own (student.seeds), views have theirs (views.seed).
    device: auto (the freest GPU, or the first that CUDA_VISIBLE_DEVICES leaves; the CPU without one), cpu, cuda or
    cuda:N. num_threads: CPU threads of each operation; by default OMP_NUM_THREADS, else as many as this process may use
    cores. Networks of a few thousand parameters train fastest on one.
    gpu_memory_fraction: the share of the GPU's memory that this job may take at most; beyond it it is out of memory.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=200)]
    seed: Seed = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")] = "auto"
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    data: DataConfig = Field(default_factory=DataConfig)
    views: ViewsConfig = Field(default_factory=ViewsConfig)
    teacher: TeacherConfig
    cache: CacheConfig = Field(default_factory=CacheConfig)
    student: StudentConfig
    distill: tuple[LossConfig, ...] = ()
    compare: dict[WayName, CompareEntry] = Field(default_factory=dict)
    compress: CompressConfig = Field(default_factory=CompressConfig)


def load_recipe(path: Path, overrides: Iterable[str] = (), environ: Mapping[str, str] = NOTHING) -> Recipe:
    """Read the recipe at `path`. The KDPIPE_ variables of `environ` go before its keys, and `key.key=value` overrides
    before both. Raises RecipeError where anything is amiss.
    """
    return parse_layers(read_layers(path, overrides, environ))


def load_recipe_with_origins(
    path: Path, overrides: Iterable[str] = (), environ: Mapping[str, str] = NOTHING
) -> tuple[Recipe, Settings]:
    """What `load_recipe` reads, and for each of its keys the value with where it comes from."""
    layers = read_layers(path, overrides, environ)
    recipe = parse_layers(layers)
    return recipe, settings_of(recipe_json(recipe), layers)


def parse_recipe(table: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from what its file holds. Raises RecipeError, naming key and value, where anything is amiss."""
    return parse_layers(Layers(where, "", dict(table)))


def parse_layers(layers: Layers) -> Recipe:
    """A recipe from its file and what overrides it. Raises RecipeError for the first fault, saying how many more."""
    recipe, found = examine_layers(layers)
    if recipe is None or found:
        raise RecipeError(first_and_more(found))
    return recipe


def examine_layers(layers: Layers) -> tuple[Recipe | None, list[str]]:
    """The recipe, where its keys and values can be read, and a sentence for everything that is wrong with it."""
    try:
        text = json.dumps(layers.table, default=str)
        recipe: Recipe = TypeAdapter(Recipe).validate_json(text)
    except ValidationError as error:
        return None, faults(Recipe, error, layers.giver)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, sections in sections in sections
        return None, [one_line(f"{layers.path}: no recipe is nested, or has numbers, like this ({error}).")]
    return recipe, [one_line(f"{layers.path}: {fault}") for fault in _contradictions(recipe)]


def faults_of_each(losses: Sequence[Entry], where: str, check: Callable[[Sequence[Entry]], object]) -> Iterator[str]:
    """What `check` says against each of the losses alone, which stand at `where` in the recipe."""
    for number, loss in enumerate(losses):
        if fault := fault_of(check, [loss]):
            yield fault.replace(f"{where}.0 (", f"{where}.{number} (", 1)


def fault_of(check: Callable[..., object], *what: Any) -> str | None:
    """What `check` says against `what`; None where it has no objection."""
    try:
        check(*what)
    except (RecipeError, ModelError) as error:
        return str(error)
    return None


def _contradictions(recipe: Recipe) -> Iterator[str]:
    """What does not go together, whatever the data and the networks."""
    if fault := fault_of(check_views, recipe.views):
        yield fault
    for where, losses in all_losses(recipe).items():

        def check(some: Sequence[Entry], where: str = where) -> None:
            check_losses(some, recipe.views, recipe.student.teachers, where)

        yield from dict.fromkeys(faults_of_each(losses, where, check))


def all_losses(recipe: Recipe) -> dict[str, Sequence[Entry]]:
    """All losses of the recipe, by where they stand in it."""
    ways = {f"compare.{name}.distill": entry.distill for name, entry in recipe.compare.items()}
    return {"distill": recipe.distill, **ways}


def read_run_recipe(run: Path) -> Recipe | None:
    """The resolved recipe of a run folder; None where there is none. Raises RunError where it is no recipe."""
    record = read_json(run / "recipe.json")
    if record is not None and isinstance(compress := record.get("compress"), dict):
        compress.pop("latency_batch_size", None)  # of an older kdpipe, which timed batches of one size
    try:
        return None if record is None else parse_recipe(record, str(run / "recipe.json"))
    except RecipeError as error:
        raise RunError(
            f"{run} holds something else than a run of this kdpipe ({error}): use another folder."
        ) from error


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe: every key with the value in force. `parse_recipe` reads it back."""
    resolved: dict[str, Any] = asdict(recipe)
    return resolved
