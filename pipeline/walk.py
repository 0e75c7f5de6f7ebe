"""The stages in their order, on one recipe and one run folder: what each command does once the recipe is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.recipe.load import Recipe, all_losses, read_run_recipe, recipe_json
from stages.artefacts import artifact_folder
from stages.cache_plan import plan_cache, probe
from stages.cache_teacher import cache_teacher
from stages.compress import STEPS, Step, compress, compressed_root, float_job, is_done, rehearse
from stages.compression.sensitivity import LayerSensitivity
from stages.datasets.image_set import ImageSet
from stages.datasets.load import DataConfig, load_dataset
from stages.errors import RecipeError
from stages.export_student import export_student
from stages.fine_tune import FineTuneContext
from stages.forms import Wanted, parse_wanted
from stages.job_folder import write_json
from stages.lesson import Lesson
from stages.losses.entry import Entry
from stages.losses.terms import wanted_of
from stages.machine.cores import num_threads
from stages.machine.device import take_device
from stages.machine.memory import keep_freed_memory
from stages.network import Network
from stages.part import WHOLE, Part
from stages.partners import find_partners, population_of
from stages.processes import ONE, Processes
from stages.rehearse_losses import rehearse_losses
from stages.sensitivity import student_sensitivity
from stages.serving import smallest
from stages.setup import Setup, require_fitting_test_images, test_size
from stages.show_views import ShownViews, show_views
from stages.store_plan import source_shapes
from stages.teacher_on_test import cache_test, teacher_logits, test_place, test_setup
from stages.teaching import Teaching, on_this_machine, open_for
from stages.train_student import (
    ALONE,
    DISTILLED,
    StudentConfig,
    build_lesson,
    fresh_student,
    open_teaching,
    student_shapes,
    train_student,
    view_warning,
)
from stages.train_teacher import (
    load_teacher,
    require_same_training,
    teacher_folder,
    teacher_identity,
    train_teacher,
    untrained_teacher,
)
from stages.watch import Event, Watch
from store import StoreError, is_url, make_folders, read_store_manifest


@dataclass(frozen=True)
class Walk:
    """A recipe under way in its run folder; data and stores are opened when a stage first needs them.

    share: whether a GPU may be taken that other processes use. processes: who trains together; the first one writes.
    phase: in whose block the wall time of a part of the road is counted, by its name.
    """

    recipe: Recipe
    run: Path
    watch: Watch
    part: Part = WHOLE
    share: bool = False
    processes: Processes = ONE
    phase: Callable[[str], AbstractContextManager[Any]] = nullcontext

    def begin(self) -> None:
        """Make the run folder, and take no more threads than the recipe says.

        Raises RunError where the folder is something else's. A recipe that stands there already stays until this one
        has done its work: a refused command must not change what the folder says of itself.
        """
        make_folders([self.run])
        if read_run_recipe(self.run) is None:
            self.keep_recipe()
        self.take_machine()

    def take_machine(self) -> None:
        """Take as many CPU threads as the recipe says, else as this process has cores; take the GPU; keep memory.

        Raises LockedError where the GPU is in use, RecipeError where the recipe's is absent.
        """
        torch.set_num_threads(self.recipe.num_threads or num_threads(os.environ))
        keep_freed_memory()
        _ = self.device  # now: what is refused must be refused before any work is done

    @cached_property
    def device(self) -> torch.device:
        """The device of the recipe, taken."""
        warn, fraction = partial(self.watch.warn, "device"), self.recipe.gpu_memory_fraction
        return take_device(self.recipe.device, share=self.share, memory_fraction=fraction, warn=warn)

    def keep_recipe(self) -> None:
        """Write the resolved recipe into the run folder."""
        if self.processes.first:
            write_json(self.run / "recipe.json", recipe_json(self.recipe))

    @cached_property
    def setup(self) -> Setup:
        data = self.recipe.data
        train_set = self._load(data, "train")
        alone = Setup(self.run, train_set, train_set, self.recipe.views, self.device, self.watch)
        setup = replace(
            alone,
            test_set=self._load(data, "test", test_size(alone)),
            partners=self._partners(train_set),
            num_workers=data.num_workers,
            unreadable=data.unreadable,
            ask_teacher=self._ask_teacher,
            processes=self.processes,
        )
        require_fitting_test_images(setup)
        return setup

    def _ask_teacher(self) -> Tensor | None:
        """What the teachers say of the test images; None as long as their stores are not there."""
        places = self.stores
        if any(not is_url(place) and not Path(place).exists() for place in places):
            return None
        return self._teacher_logits

    @cached_property
    def _teacher_logits(self) -> Tensor | None:
        return teacher_logits(self.stores, self.recipe.student.teachers, self.setup)

    def _load(
        self,
        data: DataConfig,
        split: Literal["train", "test"],
        size: int | None = None,
        only: NDArray[np.int64] | None = None,
    ) -> ImageSet:
        """A split of the data set, or of it the samples with the ids `only`; each image that is left out is told of."""
        counter = self.watch.counter("data", f"look at every image of the {split} split", "image")
        image_set = load_dataset(data, split, size=size, only=only, on_image=counter)
        for dropped in image_set.dropped:
            self.watch.warn("data", f"sample {dropped.sample_id} is left out: {dropped.why}")
        return image_set

    def _partners(self, train_set: ImageSet) -> ImageSet | None:
        """Where the partners of MixUp and CutMix come from, if that is not simply the training set: the samples with
        which the store began.
        """
        places = [place for place in self.stores if is_url(place) or Path(place).exists()]
        if self.recipe.views.mix is None or not places:
            return None
        path = on_this_machine(places[0], self.watch)
        try:
            population = population_of(path)
        except StoreError:  # damaged: whoever reads it says so, and `store repair` takes the data set as it is
            return None
        if np.array_equal(population.ids, np.sort(train_set.sample_ids.numpy())):
            return None
        whole = replace(self.recipe.data, num_train=None, classes=None)
        return find_partners(population, self._load(whole, "train", only=population.ids), path)

    @property
    def store(self) -> Path:
        """The store that this recipe's `cache-teacher` fills."""
        named = self.recipe.cache.store
        if named and is_url(named):
            raise RecipeError(
                f"cache.store = {named!r}: the teacher's words are written to a folder; copy that elsewhere."
            )
        return (Path(named) if named else self.run / "store.zarr").absolute()

    @property
    def stores(self) -> list[Path | str]:
        """The stores that students learn from: folders, or URLs."""
        named = self.recipe.student.stores
        return [where if is_url(where) else Path(where).absolute() for where in named] or [self.store]

    def rehearse_losses(self) -> None:
        """Refuse losses that cannot join student and teacher, before the teacher is trained."""
        self.wanted_by(untrained_teacher(self.recipe.teacher, self.recipe.seed, self.setup))

    def wanted_by(self, teacher: Network) -> dict[Wanted, list[str]]:
        """What of the teacher's layers to cache, in the smallest form that serves, and who in the recipe asks for it:
        its cache section, and its losses. Raises ModelError, listing the nearest, for layers that are not there.
        """
        reasons: dict[Wanted, list[str]] = {parse_wanted(text): ["cache.layers"] for text in self.recipe.cache.layers}
        if self.store not in self.stores:
            return reasons
        for where, losses in all_losses(self.recipe).items():
            if self.stores == [self.store]:
                rehearse_losses(losses, self.recipe.student, teacher.model, self.setup, where=where)
            shapes = student_shapes(self.recipe.student, losses, self.setup)
            for number, loss in enumerate(losses):
                asked = wanted_of([loss], shapes, self.stores.index(self.store))
                given = source_shapes(teacher.model, asked, self.setup.image_shape)
                for one in asked:
                    reasons.setdefault(smallest(one, given[one.source]), []).append(f"{where}.{number} ({loss.loss})")
        return reasons

    @cached_property
    def teaching(self) -> Teaching:
        """The recipe's losses and stores, opened and checked."""
        return self.open_teaching(self.recipe.distill, self.recipe.student)

    def open_teaching(self, losses: Sequence[Entry], student: StudentConfig) -> Teaching:
        """The stores with these losses; the recipe's own store must hold the recipe's own teacher."""
        wanted: dict[str, Any] = {}
        if self.stores == [self.store]:
            require_same_training(self.recipe.teacher, self.recipe.seed, self.setup)
            identity = teacher_identity(self.recipe.teacher, self.setup)
            stored = read_store_manifest(self.store).identity.teacher
            wanted["teacher"] = {"weights_sha256": stored.get("weights_sha256"), **identity}
        return open_teaching(self.stores, losses, student, wanted, self.setup)


def walk_train_teacher(walk: Walk) -> dict[str, Any]:
    return {"teacher": train_teacher(walk.recipe.teacher, walk.recipe.seed, walk.setup)}


def walk_cache_teacher(walk: Walk) -> dict[str, Any]:
    require_same_training(walk.recipe.teacher, walk.recipe.seed, walk.setup)
    teacher = load_teacher(walk.recipe.teacher, walk.recipe.seed, walk.setup)
    layers = list(walk.wanted_by(teacher))
    _plan_test(walk, teacher, trained=True)  # what stands in the way there is told before the long work begins
    cached = cache_teacher(walk.recipe.cache, walk.store, teacher, layers, walk.setup, part=walk.part)
    tested = cache_test(walk.recipe.cache, walk.store, teacher, walk.setup, part=walk.part)
    return {"store": cached, "test_store": tested}


def _plan_test(walk: Walk, teacher: Network, *, trained: bool) -> dict[str, Any]:
    """What there is to do for the test store."""
    config, place = replace(walk.recipe.cache, top_k=None), Path(test_place(walk.store))
    return plan_cache(config, place, teacher, [], test_setup(walk.setup), trained=trained)


def walk_plan(walk: Walk, with_probe: bool) -> dict[str, Any]:
    """What `cache-teacher` would do, and with `with_probe` about how long it would take."""
    config, recipe = walk.recipe.cache, walk.recipe
    trained = teacher_folder(walk.run).result() is not None
    make = load_teacher if trained else untrained_teacher
    teacher = make(recipe.teacher, recipe.seed, walk.setup)
    wanted = walk.wanted_by(teacher)
    plan = plan_cache(config, walk.store, teacher, list(wanted), walk.setup, trained=trained)
    beside = _plan_test(walk, teacher, trained=trained)
    plan |= {key: plan[key] + beside[key] for key in ("missing_bytes", "num_images")} | {"test_store": beside}
    timed = with_probe and plan["num_images"] > 0
    measured = probe(config, teacher, list(wanted), walk.setup, plan["num_images"]) if timed else None
    asked_by = {one.array: reasons for one, reasons in wanted.items()}
    return {**plan, "teacher_trained": trained, "layers_wanted_by": asked_by, "probe": measured}


def walk_views(walk: Walk, num_samples: int, num_views: int) -> tuple[ShownViews, str | None]:
    """Some samples in their first views, with what the first store says of them; and which store that is."""
    place = walk.stores[0]
    if not is_url(place) and (not Path(place).exists() or read_store_manifest(Path(place)).finished is None):
        return show_views(walk.setup, None, num_samples, num_views), None
    store = open_for(walk.setup, on_this_machine(place, walk.watch), {})
    return show_views(walk.setup, store, num_samples, num_views), str(place)


def try_teaching(walk: Walk, teaching: Teaching, student: StudentConfig) -> Lesson:
    """Build a first lesson: what will not do is refused, and what people should know told, before any training."""
    seed = student.seeds[0]
    lesson = build_lesson(fresh_student(student, seed, walk.setup, teaching.losses), teaching, seed, walk.setup)
    if lesson.targets and lesson.targets.num_unknown:
        some = f"{lesson.targets.num_unknown:,} of {lesson.num_samples:,} samples have no targets"
        walk.watch.warn("train-student", f"{some}: they learn from their labels alone.")
    return lesson


def require_losses(walk: Walk) -> None:
    """Raise RecipeError for a recipe without a loss: its distilled student would be taught by nobody."""
    if not walk.recipe.distill:
        raise RecipeError(
            f"the recipe {walk.recipe.name} has no [[distill]]: add a loss (`kdpipe losses` lists them), or compare "
            "students without a teacher with `kdpipe compare`."
        )


def walk_train_student(walk: Walk) -> dict[str, Any]:
    require_losses(walk)
    teaching, seeds = walk.teaching, walk.recipe.student.seeds
    if warning := view_warning(walk.recipe.views):
        walk.watch.warn("train-student", warning)
    lesson = try_teaching(walk, teaching, walk.recipe.student)
    for number, line in enumerate(lesson.targets.describe() if lesson.targets else (), 1):
        walk.watch.report(Event("train-student", f"reads {line}", number, len(teaching.stores), "store"))
    students: dict[str, list[dict[str, Any]]] = {ALONE: [], DISTILLED: []}
    for seed in seeds:
        students[ALONE].append(train_student(walk.recipe.student, seed, None, walk.setup))
        students[DISTILLED].append(train_student(walk.recipe.student, seed, teaching, walk.setup))
    return {"students": students}


def walk_compress(walk: Walk, only: Step | None = None) -> dict[str, Any]:
    """Prune, quantize and export the students, or do `only` one of these."""
    recipe, setup = walk.recipe, walk.setup
    config, student = recipe.compress, recipe.student
    steps = STEPS if only is None else (only,)
    if only in ("prune", "quantize") and only not in config.steps:
        raise RecipeError(f"--only {only}: compress.steps is {list(config.steps)}; give the recipe that step, too.")
    if config.steps:
        require_losses(walk)
    if not is_done(config, student, setup.run):
        rehearse(config, student, setup)
    compressed = [compress(config, student, seed, walk.teaching, setup, only=steps) for seed in student.seeds]
    cards = []
    if "export" in steps:
        cards = [
            export_student(config, student, seed, walk.teaching, setup, name=recipe.name) for seed in student.seeds
        ]
    root = compressed_root(walk.run, config)
    folders = [str(artifact_folder(root, card["seed"])) for card in cards]
    artifacts = [{"folder": folder, **card} for folder, card in zip(folders, cards, strict=True)]
    return {"compressed": compressed, "artifacts": artifacts}


def walk_sensitivity(walk: Walk, num_batches: int) -> tuple[str, list[LayerSensitivity]]:
    """How much each layer of the first seed's float student suffers from INT8, and which network that is."""
    config, student = walk.recipe.compress, walk.recipe.student
    context = FineTuneContext(student, student.seeds[0], walk.teaching, walk.setup, compressed_root(walk.run, config))
    return float_job(config, context).path.name, student_sensitivity(config, context, num_batches)


STAGES: dict[str, Callable[[Walk], dict[str, Any]]] = {
    "train-teacher": walk_train_teacher,
    "cache-teacher": walk_cache_teacher,
    "train-student": walk_train_student,
    "compress": walk_compress,
}
"""The road, in order."""


def walk_all(walk: Walk) -> dict[str, Any]:
    """Every stage; each skips what is done."""
    rehearse(walk.recipe.compress, walk.recipe.student, walk.setup)
    require_losses(walk)
    walk.rehearse_losses()
    results: dict[str, Any] = {}
    for name, stage in STAGES.items():
        with walk.phase(name):
            results |= stage(walk)
    return results
