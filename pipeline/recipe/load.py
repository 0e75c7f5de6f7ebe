"""Load recipes: TOML files that describe one experiment each, read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from kdpipe.pipeline.callbacks.registry import CallbackEntry
from kdpipe.pipeline.recipe.messages import fault_messages, first_and_more, one_line
from kdpipe.pipeline.recipe.overrides import Overrides, Settings, read_with_overrides, settings_of
from kdpipe.pipeline.recipe.search.config import SearchConfig
from kdpipe.pipeline.recipe.search.space import SearchSpace, search_space
from kdpipe.pipeline.recipe.sweep import SweepPoint, sweep_points
from kdpipe.stages.cache_teacher.plan import CacheConfig
from kdpipe.stages.cohort.config import CohortConfig, check_peer_losses, require_one_kind
from kdpipe.stages.compress.compress import CompressConfig
from kdpipe.stages.config import Seed, section
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.distillation.compatibility import check_hard_label_views, check_losses
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.errors import ModelError, RecipeError, RunError
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.registry import WITHOUT_CODE, AnyLoss, UnknownLoss
from kdpipe.stages.teacher import TeacherConfig
from kdpipe.stages.train_student.compare import CompareEntry, VariantName, with_overrides
from kdpipe.stages.training.job_dir import read_json_file, write_json_file
from kdpipe.stages.training.optim import TrainConfig, check_training
from kdpipe.stages.training.set_up import no_second_derivative
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.renderer import check_views
from kdpipe.store import exclusive
from kdpipe.store.redact import redacted_json, redacted_options

RUN_FILES_LOCK = ".run.json.lock"
"""The lock of the files in a run folder itself, which several processes may write."""

NOTHING: Mapping[str, str] = MappingProxyType({})


@section
class Recipe:
    """One experiment, from teacher to INT8 student.

    Attributes:
        name: Name of the experiment and of its run folder below `runs/`.
        seed: Seed of the teacher; each student has its own (student.seeds), and views have theirs (views.seed).
        device: auto (the freest GPU, or the first that CUDA_VISIBLE_DEVICES leaves; the CPU without one), cpu, cuda or
            cuda:N.
        num_threads: CPU threads of each operation; by default OMP_NUM_THREADS, else what is fastest for each kind of
            work, up to the cores that this process may use. Networks of a few thousand parameters train fastest on one.
        gpu_memory_fraction: Fraction of the GPU's memory that this job may use; beyond it, it is out of memory.
        cohort: Students that teach each other, for `kdpipe cohort`.
        sweep: Values to try with `kdpipe sweep`: a list for each key of student and distill, in all combinations.
        callbacks: What observes every training: csv, tensorboard, wandb, mlflow, trackio and others, or
            "python:MODULE:CLASS"; a table of name and arguments where it has some.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=200)]
    seed: Seed = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")] = "auto"
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    callbacks: tuple[CallbackEntry, ...] = ()
    data: DataConfig = Field(default_factory=DataConfig)
    views: Views = Field(default_factory=Views)
    teacher: TeacherConfig
    cache: CacheConfig = Field(default_factory=CacheConfig)
    student: StudentConfig
    distill: tuple[AnyLoss, ...] = ()
    compare: dict[VariantName, CompareEntry] = Field(default_factory=dict)
    cohort: CohortConfig | None = None
    sweep: dict[str, Any] = Field(default_factory=dict)
    search: SearchConfig = Field(default_factory=SearchConfig)
    compress: CompressConfig = Field(default_factory=CompressConfig)

    @cached_property
    def points(self) -> list[SweepPoint]:
        """The combinations of the sweep; raises RecipeError for an invalid key or value."""
        return sweep_points(self.sweep, self.student, self.distill)

    @cached_property
    def space(self) -> SearchSpace | None:
        """The space of `kdpipe search`, None without one; raises RecipeError for an invalid key, range or condition."""
        return search_space(self.search, self.student, self.distill, self.compress) if self.search.is_given else None

    @cached_property
    def structures(self) -> list[SweepPoint]:
        """Settings of the search that have all of its choices: what these need is all that any trial does."""
        settings = self.space.structures() if self.space else ()
        return [self.space.point(own, f"setting {number}") for number, own in enumerate(settings, 1) if self.space]


def load_recipe(path: Path, overrides: Iterable[str] = (), environ: Mapping[str, str] = NOTHING) -> Recipe:
    """Load the recipe at `path`.

    Args:
        path: The TOML file.
        overrides: Texts `key.key=value`, which take precedence over the environment.
        environ: Variables; those that begin with KDPIPE_ take precedence over the file.

    Raises:
        RecipeError: The file cannot be read, or a key or value is invalid.
    """
    return _first_fault_raised(read_with_overrides(path, overrides, environ))


def load_recipe_with_origins(
    path: Path, overrides: Iterable[str] = (), environ: Mapping[str, str] = NOTHING
) -> tuple[Recipe, Settings]:
    """Load a recipe as `load_recipe` does, with the value and origin of each of its keys."""
    source = read_with_overrides(path, overrides, environ)
    recipe = _first_fault_raised(source)
    return recipe, settings_of(recipe_json(recipe), source)


def parse_recipe(table: Mapping[str, Any], where: str, *, import_code: bool = True) -> Recipe:
    """Build a recipe from a table. Raises RecipeError, naming `where`, key and value, for the first fault.

    Without `import_code`, losses that are not built in become an `UnknownLoss`.
    """
    return _first_fault_raised(Overrides(where, dict(table)), None if import_code else WITHOUT_CODE)


def _first_fault_raised(source: Overrides, context: Mapping[str, bool] | None = None) -> Recipe:
    recipe, found = validate(source, context)
    if recipe is None or found:
        raise RecipeError(first_and_more(found))
    return recipe


def validate(source: Overrides, context: Mapping[str, bool] | None = None) -> tuple[Recipe | None, list[str]]:
    """Return the recipe, or None where a key or value cannot be read, and a message for every fault."""
    try:
        text = json.dumps(source.table, default=str)
        recipe: Recipe = TypeAdapter(Recipe).validate_json(text, context=context)
    except ValidationError as error:
        return None, fault_messages(Recipe, error, source.origin_of)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endlessly nested sections
        return None, [one_line(f"{source.path} is not a recipe: its nesting or its numbers are too long ({error}).")]
    recipe = _without_alone(recipe)
    return recipe, [one_line(f"{source.path}: {fault}") for fault in _contradictions(recipe)]


def _without_alone(recipe: Recipe) -> Recipe:
    """Return the recipe without the networks that learn from labels alone, if there are no labels or no classifier.

    Of images without labels the student of a teacher of embeddings returns embeddings.
    """
    student = recipe.student
    if recipe.data.labels == "none" and recipe.teacher.is_headless and not student.stores:
        student = replace(student, output=recipe.teacher.output)
    if recipe.data.labels != "none" and not student.is_headless:
        return recipe
    compress = replace(recipe.compress, baselines=False)
    return replace(recipe, student=replace(student, baseline=False), compress=compress)


def faults_of_each(losses: Sequence[Loss], where: str, check: Callable[[Sequence[Loss]], object]) -> Iterator[str]:
    """Yield the faults that `check` finds in each of the losses alone. `where` is the key of their list."""
    for number, loss in enumerate(losses):
        if fault := fault_of(check, [loss]):
            yield fault.replace(f"{where}.0 (", f"{where}.{number} (", 1)


def fault_of(check: Callable[..., object], *arguments: Any) -> str | None:
    """Return the message of the RecipeError or ModelError that `check` raises; None if it raises none."""
    try:
        check(*arguments)
    except (RecipeError, ModelError) as error:
        return str(error)
    return None


def _contradictions(recipe: Recipe) -> Iterator[str]:
    """Yield what does not fit together, whatever the data and the networks are."""
    if fault := fault_of(check_views, recipe.views):
        yield fault
    if any(isinstance(loss, UnknownLoss) for loss in recipe.distill):  # read without its code
        recipe = replace(recipe, sweep={}, search=SearchConfig())
    if fault := fault_of(lambda: recipe.points) or fault_of(lambda: recipe.space):
        yield fault
        return
    if faults := list(_faults_of_search(recipe)):
        yield from faults
        return
    for where, losses in all_losses(recipe).items():

        def check(some: Sequence[Loss], where: str = where) -> None:
            check_losses(some, recipe.views, recipe.student.teachers, where)

        yield from dict.fromkeys(faults_of_each(losses, where, check))
    for where, (student, _) in students_of(recipe).items():
        if where == "distill" or student.hard_label_views != recipe.student.hard_label_views:
            key = where.removesuffix("distill").rstrip(".: ") or "student"
            fault = fault_of(check_hard_label_views, student, recipe.views, key)
            yield from [fault] if fault else []
    if recipe.cohort is not None:
        fault = fault_of(require_one_kind, recipe.views)
        yield from [fault] if fault else []
        check = partial(check_peer_losses, config=recipe.cohort)
        yield from faults_of_each(recipe.cohort.distill, "cohort.distill", check)
        check_all = partial(check_losses, views=recipe.views, teachers=recipe.student.teachers, where="cohort.distill")
        yield from faults_of_each(recipe.cohort.distill, "cohort.distill", check_all)
    if any(loss.input_gradient for losses in all_losses(recipe).values() for loss in losses):
        students = {key: train for key, train in trainings_of(recipe).items() if key != "teacher.train"}
        yield from (no_second_derivative(f"{key}.compile") for key, train in students.items() if train.compile)
    yield from faults_of_trainings(recipe, imports=False)


def _faults_of_search(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with the choices of the search, and with the images that decide."""
    if recipe.space is None:
        return
    if not recipe.data.validation_share:
        yield (
            "a search chooses by validation images, since the best of many trials on the test images looks better than "
            "it is: set data.validation_share, for example to 0.1."
        )
    yield from recipe.space.faults()


def faults_of_trainings(recipe: Recipe, *, imports: bool) -> Iterator[str]:
    """Yield the optimizers and schedules that do not exist, or have no such argument; see `check_training`."""
    for where, train in trainings_of(recipe).items():
        try:
            check_training(train, where, imports=imports)
        except RecipeError as error:
            yield str(error)


def trainings_of(recipe: Recipe) -> dict[str, TrainConfig]:
    """Return the trainings that the recipe asks for, by their key."""
    compress = recipe.compress
    return {
        **({"teacher.train": recipe.teacher.train} if recipe.teacher.train else {}),
        "student.train": recipe.student.train,
        **({"compress.prune_train": compress.prune_train} if compress.prunes else {}),
        **({"compress.quantize_train": compress.quantize_train} if compress.quantizes else {}),
        **{f"sweep {point.name}: student.train": point.student.train for point in recipe.points},
        **{f"search {point.name}: student.train": point.student.train for point in recipe.structures},
    }


def students_of(recipe: Recipe) -> dict[str, tuple[StudentConfig, Sequence[Loss]]]:
    """Return the recipe's students with their losses, by the key of these.

    Combinations of the sweep and the search that differ from others in the training alone are left out.
    """
    student = recipe.student
    students: dict[str, tuple[StudentConfig, Sequence[Loss]]] = {"distill": (student, recipe.distill)}
    for name, entry in recipe.compare.items():
        students[f"compare.{name}.distill"] = with_overrides(entry, student), entry.distill
    for command, points in {"sweep": recipe.points, "search": recipe.structures}.items():
        for point in points:
            own = replace(point.student, train=student.train), point.losses
            if own not in students.values():
                students[f"{command} {point.name}: distill"] = own
    return students


def all_losses(recipe: Recipe) -> dict[str, Sequence[Loss]]:
    """Return all lists of losses in the recipe, by their key or the name of a sweep's settings."""
    return {where: losses for where, (_, losses) in students_of(recipe).items()}


def read_run_recipe(run: Path) -> Recipe | None:
    """Return the resolved recipe of a run folder, which may be untrusted: no code is imported; None if it has none.

    Raises:
        RunError: It is not a recipe.
    """
    record = read_json_file(run / "recipe.json")
    try:
        return None if record is None else parse_recipe(record, str(run / "recipe.json"), import_code=False)
    except RecipeError as error:
        raise RunError(f"{run} is not a run folder of this version ({error}): use another folder.") from error


def write_run_recipe(run: Path, record: Mapping[str, Any]) -> None:
    """Write the resolved recipe of a run folder."""
    with exclusive(run, run / RUN_FILES_LOCK, wait=True):
        write_json_file(run / "recipe.json", record)


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe: every key with its value, without secrets. `parse_recipe` reads it back."""
    resolved: dict[str, Any] = redacted_json(asdict(recipe))
    return {**resolved, "callbacks": redacted_options(resolved["callbacks"])}
