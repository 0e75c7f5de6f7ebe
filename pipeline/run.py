"""A recipe at work in its run folder: its device, data, stores and distillation, opened at first use."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.pipeline.recipe.load import Recipe, all_losses, read_run_recipe, recipe_json, students_of, write_run_recipe
from kdpipe.stages.cache_teacher.choice import require_available
from kdpipe.stages.cache_teacher.plan import plan_store, samples_in_row_order
from kdpipe.stages.compute.determinism import set_deterministic
from kdpipe.stages.compute.threads import set_up_threads
from kdpipe.stages.context import StageContext, require_fitting_test_images, test_context, test_image_size
from kdpipe.stages.data.config import DataConfig
from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.labeling import hide_labels
from kdpipe.stages.data.load import load_dataset
from kdpipe.stages.data.loader.mix_partners import load_partner_pool, read_partner_pool
from kdpipe.stages.data.splits import VALIDATION, Part
from kdpipe.stages.distillation.compatibility import require_fitting_encoding, temperatures_of
from kdpipe.stages.distillation.spec import DistillationSpec
from kdpipe.stages.distillation.stores import open_distillation
from kdpipe.stages.distillation.student_config import StudentConfig
from kdpipe.stages.distillation.task_builder import student_shapes
from kdpipe.stages.distillation.teacher_accuracy import (
    TeacherEmbeddings,
    TeacherLogits,
    teacher_embeddings,
    teacher_logits,
)
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.distillation import required_of
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.classes import class_names_of
from kdpipe.stages.runtime.cpu import omp_num_threads
from kdpipe.stages.runtime.distributed import SINGLE, ProcessGroup
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.runtime.gpu.device import select_device
from kdpipe.stages.runtime.launcher import ALL, WorkShard
from kdpipe.stages.runtime.memory import disable_malloc_trim
from kdpipe.stages.targets.feature_spec import FeatureSpec, parse_feature, source_shapes
from kdpipe.stages.targets.open import local_store_path, part_store_path, trust_links
from kdpipe.stages.targets.resolve import smallest_feature
from kdpipe.stages.targets.tail_mass import TailMass, measure_tails
from kdpipe.stages.teacher import require_same_training, teacher_identity, untrained_teacher
from kdpipe.stages.train_student.preflight import dry_run_losses
from kdpipe.stages.workspace import NOWHERE, RECIPE, Workspace, store_of_run
from kdpipe.store import StoreError, TopK, is_url, make_folders, read_store_manifest
from kdpipe.store.fs.checksums import read_intact_json


@dataclass(frozen=True)
class Run:
    """A recipe at work in its run folder; data and stores are opened when a stage first needs them.

    Attributes:
        folder: The run folder.
        work_shard: The share of the stores' units that this process computes.
        share: Whether a GPU that other processes use may be used.
        process_group: The processes that train together; the first one writes.
        workspace: The other runs whose teachers, stores and students are used.
        keeps_images: Whether the images of a folder are kept in memory where they fit.
        phase: Returns a context that records the wall time of its block under a name.
    """

    recipe: Recipe
    folder: Path
    monitor: RunMonitor
    work_shard: WorkShard = ALL
    share: bool = False
    process_group: ProcessGroup = SINGLE
    workspace: Workspace = NOWHERE
    keeps_images: bool = True
    phase: Callable[[str], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        if self.recipe.student.target_loading.follow_links:  # before anything reads the stores
            trust_links(self.stores)

    def begin(self) -> None:
        """Create the run folder and set up the machine.

        A recipe already there stays until this command has succeeded, so that a refused command changes nothing.

        Raises:
            RunError: If the folder belongs to something else.
        """
        make_folders([self.folder])
        if read_run_recipe(self.folder) is None:
            self.write_recipe()
        self.set_up_machine()

    def set_up_machine(self) -> None:
        """Set the number of CPU threads, reserve the GPU and configure the memory allocator.

        Raises:
            LockedError: If the GPU is in use.
            RecipeError: If the recipe's device does not exist.
        """
        set_up_threads(self.recipe.num_threads or omp_num_threads(os.environ))
        disable_malloc_trim()
        set_deterministic(self.device)  # fails before any work is done where the device does not exist

    @cached_property
    def device(self) -> torch.device:
        """The reserved device of the recipe."""
        warn, fraction = partial(self.monitor.warn, "device"), self.recipe.gpu_memory_fraction
        return select_device(self.recipe.device, share=self.share, memory_fraction=fraction, warn=warn)

    def write_recipe(self) -> None:
        """Write the resolved recipe into the run folder."""
        if self.process_group.is_main:
            used = None if self.recipe.cache.store or self.store == self.own_store else str(self.store)
            recipe = replace(self.recipe, cache=replace(self.recipe.cache, store=used)) if used else self.recipe
            write_run_recipe(self.folder, recipe_json(recipe))

    @cached_property
    def context(self) -> StageContext:
        """The shared context of all stages."""
        data = self.recipe.data
        train_set = self._load(data, "train")
        alone = StageContext(self.folder, train_set, train_set, self.recipe.views, self.device, self.monitor)
        context = replace(
            alone,
            test_set=self._load(data, "test", test_image_size(alone)),
            mix_partners=self._partners(train_set),
            num_workers=data.num_workers,
            unreadable=data.unreadable,
            get_teacher_logits=self._get_teacher_logits,
            get_teacher_embeddings=self._get_teacher_embeddings,
            load_test=partial(self._load, data, "test"),
            validation_set=self._load(data, "validation", test_image_size(alone)) if data.validation_share else None,
            load_validation=partial(self._load, data, "validation"),
            process_group=self.process_group,
            workspace=self.workspace.beside(self.recipe.cache.store, *self.recipe.student.stores),
        )
        require_fitting_test_images(context)
        return context

    def _get_teacher_logits(self, part: Part) -> TeacherLogits | None:
        """Return the teachers' logits of the test or validation images; None while their stores are missing."""
        if not self._has_all_stores:
            return None
        if part not in self._teacher_logits:
            found = teacher_logits(self.stores, self.recipe.student.teachers, self.context, part)
            self._teacher_logits[part] = found
        return self._teacher_logits[part]

    def _get_teacher_embeddings(self, part: Part) -> TeacherEmbeddings | None:
        """Return the teacher's embeddings of the test or validation images; None while its store is missing."""
        if not self._has_all_stores:
            return None
        if part not in self._teacher_embeddings:
            self._teacher_embeddings[part] = teacher_embeddings(self.stores, self.context, part)
        return self._teacher_embeddings[part]

    @property
    def _has_all_stores(self) -> bool:
        return all(is_url(store) or Path(store).exists() for store in self.stores)

    @cached_property
    def _teacher_embeddings(self) -> dict[Part, TeacherEmbeddings | None]:
        return {}

    @cached_property
    def _teacher_logits(self) -> dict[Part, TeacherLogits | None]:
        return {}

    def _load(
        self,
        data: DataConfig,
        split: Part,
        size: int | None = None,
        only: NDArray[np.int64] | None = None,
    ) -> ImageSet:
        """Load a split of the data set, or only the samples with the ids `only`; warn of all that is left out."""
        counter = self.monitor.counter("data", f"scan the images of the {split} split", "image")
        image_set = load_dataset(
            data,
            split,
            size=size,
            only=only,
            keep=self.keeps_images,
            on_image=counter,
            name_classes=self._name_classes,
        )
        for notice in image_set.notices:
            self.monitor.warn("data", notice)
        for dropped in image_set.dropped:
            self.monitor.warn("data", f"sample {dropped.sample_id} is left out: {dropped.why}")
        return image_set

    def _name_classes(self) -> tuple[str, ...]:
        """Return the names of the teacher's classes; embeddings have none."""
        found = class_names_of(self.recipe.teacher.model)
        return found or (("unlabeled",) if self.recipe.teacher.is_headless else ())

    def _partners(self, train_set: ImageSet) -> ImageSet | None:
        """Return the images that MixUp and CutMix choose partners from: those that the store began with.

        None if these are simply the training set.
        """
        places = [store for store in self.stores if is_url(store) or Path(store).exists()]
        if self.recipe.views.mix is None or not places:
            return None
        path = local_store_path(places[0], self.monitor)
        try:
            pool = read_partner_pool(path)
        except StoreError:  # damaged: readers of the store report it, and `store repair` uses the data set as it is
            return None
        if np.array_equal(pool.ids, np.sort(train_set.sample_ids.numpy())):
            return None
        whole = replace(self.recipe.data, num_train=None, classes=None, validation_share=0.0, labels="all")
        return hide_labels(load_partner_pool(pool, self._load(whole, "train", only=pool.ids), path), train_set)

    @property
    def store(self) -> Path:
        """The store that this recipe's `cache-teacher` fills, or that of another run which it found complete."""
        named = self.recipe.cache.store
        if named and is_url(named):
            raise RecipeError(
                f"cache.store = {named!r} is a URL: name a folder, and upload it after `kdpipe cache-teacher`."
            )
        if named:
            return Path(named).absolute()
        return self.own_store if self.own_store.exists() else next(iter(self.used_stores), self.own_store)

    @property
    def own_store(self) -> Path:
        """The store in the run folder."""
        return (self.folder / "store.zarr").absolute()

    @property
    def used_stores(self) -> list[Path]:
        """The store of another run that this one uses, as its folder records; none if there is no record."""
        used = store_of_run(self.folder)
        return [] if used == self.own_store else [used]

    def use_store(self, path: Path | None) -> None:
        """Record that this run uses the store of another one, or its own, for later commands and `kdpipe clean`."""
        record = read_intact_json(self.folder / RECIPE) or {}
        store = None if path is None else str(path)
        write_run_recipe(self.folder, {**record, "cache": {**record["cache"], "store": store}})

    def evaluation_stores(self, store: Path) -> dict[Part, tuple[Path, StageContext]]:
        """Return the stores beside a store, of the teacher's logits of evaluated images, with the context of these."""
        contexts: dict[Part, StageContext] = {"test": test_context(self.context)}
        if self.context.validation_set is not None:
            contexts[VALIDATION] = test_context(self.context.deciding)
        return {part: (Path(part_store_path(store, part)), images) for part, images in contexts.items()}

    @property
    def stores(self) -> list[Path | str]:
        """The stores that students learn from: folders, or URLs."""
        named = self.recipe.student.stores
        return [where if is_url(where) else Path(where).absolute() for where in named] or [self.store]

    @property
    def has_stores(self) -> bool:
        """Whether students have stores to learn from that are named, or that this run made or used before."""
        return self.stores != [self.store] or self.store != self.own_store or self.own_store.exists()

    def check_losses_fit(self) -> dict[FeatureSpec, list[str]]:
        """Check that all losses fit student and teacher, and the store its format, before the teacher is trained.

        Returns:
            The required features, as `required_features`.
        """
        require_available(self.recipe.cache.precision, self.device)
        teacher = untrained_teacher(self.recipe.teacher, self.recipe.seed, self.context)
        required = self.required_features(teacher)
        samples = samples_in_row_order(self.context)
        planned = plan_store(self.recipe.cache, teacher, list(required), samples, self.context)
        for where, (student, losses) in students_of(self.recipe).items() if self.stores == [self.store] else ():
            require_fitting_encoding(planned.encoding, losses, student.teachers, where)
        return required

    def required_features(self, teacher: ModelBundle) -> dict[FeatureSpec, list[str]]:
        """Return the teacher features to cache, in the smallest sufficient form, each with the keys that require it.

        Raises:
            ModelError: If a layer does not exist; lists the nearest names.
        """
        reasons: dict[FeatureSpec, list[str]] = {
            parse_feature(text): ["cache.layers"] for text in self.recipe.cache.layers
        }
        if self.store not in self.stores:
            return reasons
        for where, (student, losses) in students_of(self.recipe).items():
            if self.stores == [self.store]:
                dry_run_losses(losses, student, teacher.model, self.context, where=where)
            shapes = student_shapes(student, losses, self.context)
            for number, loss in enumerate(losses):
                required = required_of([loss], shapes, self.stores.index(self.store))
                available = source_shapes(teacher.model, required, self.context.image_shape)
                for feature in required:
                    smaller = smallest_feature(feature, available[feature.source])
                    reasons.setdefault(smaller, []).append(f"{where}.{number} ({loss.loss})")
        return reasons

    def tail_masses(self, top_k: TopK | None, tail: NDArray[Any]) -> list[TailMass]:
        """Return what the temperatures of the losses leave to classes that a store lacks, from tails [n, G]."""
        if top_k is None or self.store not in self.stores:
            return []
        number = self.stores.index(self.store)
        temperatures = [
            one
            for where, losses in all_losses(self.recipe).items()
            for one in temperatures_of(losses, self.recipe.student.teachers, number, where)
        ]
        return list(measure_tails(temperatures, top_k, tail))

    @cached_property
    def distillation(self) -> DistillationSpec:
        """The recipe's losses and stores, opened and checked."""
        return self.open_distillation(self.recipe.distill, self.recipe.student)

    def open_distillation(self, losses: Sequence[Loss], student: StudentConfig) -> DistillationSpec:
        """Open the stores for these losses; the recipe's own store must contain the recipe's own teacher."""
        expected: dict[str, Any] = {}
        if self.stores == [self.store]:
            require_same_training(self.recipe.teacher, self.recipe.seed, self.context)
            identity = teacher_identity(self.recipe.teacher, self.context)
            stored = read_store_manifest(self.store).identity.teacher.get("weights_sha256")
            expected["teacher"] = {"weights_sha256": stored, **identity}
            beside = replace(self.context, run_dir=self.store.parent)
            if (
                self.recipe.teacher.train
                and teacher_identity(self.recipe.teacher, beside).get("weights_sha256") == stored
            ):
                require_same_training(self.recipe.teacher, self.recipe.seed, beside)
        return open_distillation(self.stores, losses, student, expected, self.context)
