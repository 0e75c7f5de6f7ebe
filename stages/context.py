"""The context that stages build from: samples, views, device, run folder and monitor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kdpipe.stages.data.image_set import (
    ImageSet,
    digest,
    kept_labels,
    normalization,
    pixel_checksums,
    unequal_sizes_message,
)
from kdpipe.stages.data.loader.image_loader import ImageLoader
from kdpipe.stages.data.splits import VALIDATION, Part
from kdpipe.stages.data.tasks import CLASSIFICATION
from kdpipe.stages.errors import DataError, RecipeError
from kdpipe.stages.evaluation.embeddings import MAX_LABELED
from kdpipe.stages.evaluation.evaluate import Evaluation, LogitsAt
from kdpipe.stages.models.build import PUBLISHED, ModelConfig, architecture
from kdpipe.stages.models.classes import build_for_classes
from kdpipe.stages.models.libraries.by_name import prefix_of, scaling_of_weights
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.numerics import derive_seed
from kdpipe.stages.runtime.distributed import SINGLE, ProcessGroup
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.renderer import Renderer
from kdpipe.stages.workspace import NOWHERE, Workspace
from kdpipe.store import Samples

VIEW_SIZE = "view_size"
"""Key of an architecture record: (H, W) of the views, if a network gets them resized."""


def _no_logits(part: Part) -> None:
    return None


@dataclass(frozen=True)
class StageContext:
    """The data, views and machine of a run, from which models, loaders, targets and tasks are built.

    Attributes:
        run_dir: The run folder, through which stages exchange files.
        train_set: The training images.
        test_set: The test images.
        views: The recipe's `views` section.
        device: The device to compute on.
        monitor: Progress reports and the stop flag.
        mix_partners: The images that MixUp and CutMix take partners from; by default the training images.
        num_workers: As in the recipe's `data` section.
        unreadable: As in the recipe's `data` section.
        get_teacher_logits: Returns what reads the teachers' logits of the images of a part, if they are available.
        get_teacher_embeddings: The same of the first teacher's embeddings.
        process_group: The processes that train together; the first of them writes.
        load_test: Loads the test images in another size; by default `test_set` is resized.
        validation_set: The images that decide in place of the test images; None if there are none.
        load_validation: Loads them in another size.
        of_embeddings: Whether networks have no classifier, and their embeddings are compared with the teacher's.
        input_size: Side of the square to which a network's images are resized; None leaves the views' size.
        workspace: The other runs whose finished jobs are used instead of training the same again.
    """

    run_dir: Path
    train_set: ImageSet
    test_set: ImageSet
    views: Views
    device: torch.device
    monitor: RunMonitor
    mix_partners: ImageSet | None = None
    num_workers: int | None = None
    unreadable: Literal["stop", "drop"] = "stop"
    get_teacher_logits: Callable[[Part], LogitsAt | None] = _no_logits  # named, so that loaders can be pickled
    get_teacher_embeddings: Callable[[Part], LogitsAt | None] = _no_logits
    of_embeddings: bool = False
    process_group: ProcessGroup = SINGLE
    load_test: Callable[[int], ImageSet] | None = None
    validation_set: ImageSet | None = None
    load_validation: Callable[[int], ImageSet] | None = None
    input_size: int | None = None
    workspace: Workspace = NOWHERE

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The networks' input shape, (C, H, W)."""
        shape = self.renderer.shape
        return shape if self.input_size is None else (shape[0], self.input_size, self.input_size)

    def resized(self, size: int | None) -> StageContext:
        """Return the context of a network that gets the same images resized to a square; one and the same each time.

        The teacher's views are resized, not rendered in another size: boxes, flips, colors and mixtures are so the
        same by construction, whatever the operations are.

        Raises:
            RecipeError: The views are not square.
        """
        if size is None or (size, size) == self.image_shape[1:]:
            return self
        _, height, width = self.renderer.shape
        if height != width:
            raise RecipeError(
                f"student.image_size = {size} needs square views, and these are of {height} x {width} pixels."
            )
        return self._resized.setdefault(size, replace(self, input_size=size))

    @cached_property
    def _resized(self) -> dict[int, StageContext]:
        return {}

    @cached_property
    def for_embeddings(self) -> StageContext:
        """The context of students that return embeddings."""
        return replace(self, of_embeddings=True)

    @cached_property
    def renderer(self) -> Renderer:
        """The renderer of views of the training images."""
        train_set, pool = self.train_set, self.mix_partners or self.train_set
        partners = torch.sort(pool.sample_ids).values
        if train_set.image_size is None and self.views.engine == "tensor":
            raise RecipeError(unequal_sizes_message(train_set))
        return Renderer(self.views, train_set.in_channels, train_set.image_size, partners)

    @cached_property
    def train_loader(self) -> ImageLoader:
        """The training images in their views."""
        return ImageLoader(
            self.train_set,
            self.device,
            self.renderer,
            self.mix_partners,
            self.num_workers,
            self._on_unreadable,
            self.input_size,
        )

    @cached_property
    def test_loader(self) -> ImageLoader:
        """The test images, without views."""
        test_set, size = self.test_set, self.input_size
        if size is not None and self.load_test is not None:
            test_set = self.load_test(size)
            if not torch.equal(test_set.sample_ids, self.test_set.sample_ids):
                raise DataError(f"the test images of {test_set.name} changed while the job ran: start it again.")
        return ImageLoader(
            test_set, self.device, num_workers=self.num_workers, on_failure=self._on_unreadable, size=size
        )

    @cached_property
    def deciding(self) -> StageContext:
        """The context whose test images are those that decide: the validation images, or without any the test images.

        They serve for what looks at an accuracy before the end: each epoch, weights of teachers, the best of variants.
        """
        if self.validation_set is None:
            return self
        return replace(
            self,
            test_set=self.validation_set,
            load_test=self.load_validation,
            validation_set=None,
            get_teacher_logits=_no_logits if self.validation_set.has_labels else self.get_teacher_logits,
        )

    def evaluation(self, normalize: Normalization) -> Evaluation:
        """Return the evaluation on the test images for a model with this input scaling."""
        warn = partial(self.monitor.warn, "evaluate")
        # A single process must not stop while the others wait for it.
        check = self.monitor.check if self.process_group.count == 1 else lambda: None
        part: Part = VALIDATION if self.test_set.split == VALIDATION else "test"
        outputs = (self.get_teacher_embeddings if self.of_embeddings else self.get_teacher_logits)(part)
        return Evaluation(self.test_loader, normalize, outputs, warn, check, of_embeddings=self.of_embeddings)

    def validation(self, normalize: Normalization) -> Evaluation | None:
        """Return the evaluation on the validation images; None if there are none."""
        return None if self.validation_set is None else self.deciding.evaluation(normalize)

    def labeled(self, normalize: Normalization, limit: int = MAX_LABELED) -> Evaluation:
        """Return labeled training images, at most `limit`, for what is fitted to a model's embeddings.

        They are as they are if they have the size of the views, else in their first view, without a partner mixed in.

        There must be some (`train_set.has_labels`).
        """
        train_set = self.train_set
        positions = train_set.labeled
        if len(positions) > limit:
            generator = torch.Generator().manual_seed(derive_seed(0, "labeled"))
            positions = positions[torch.randperm(len(positions), generator=generator)[:limit].sort().values]
        whole = train_set.image_size == self.renderer.shape[1:]
        context = replace(self, views=replace(self.views, mix=None), mix_partners=None)
        loader = ImageLoader(
            train_set.take(positions),
            self.device,
            None if whole else context.renderer,
            num_workers=self.num_workers,
            on_failure=self._on_unreadable,
            size=self.input_size,
        )
        test, view = self.evaluation(normalize), None if whole else 0
        return replace(test, loader=loader, teacher_logits=None, view=view, of_embeddings=False)

    def _on_unreadable(self, sentence: str) -> None:
        """Raise DataError for an unreadable image, or drop it from its batch with a warning, as configured."""
        if self.unreadable == "stop":
            raise DataError(f"{sentence} (data.unreadable = 'drop' leaves such samples out)")
        self.monitor.warn("data", f"{sentence} It is left out of this epoch.")

    def architecture(self, config: ModelConfig, *, headless: bool = False) -> dict[str, Any]:
        """Return the record from which a network for these images and classes can be rebuilt."""
        train_set, headless = self.train_set, headless or self.of_embeddings
        num_classes = 0 if headless else train_set.num_classes
        record = architecture(config, num_classes, train_set.in_channels, self.image_shape[1:])
        return record if self.input_size is None else {**record, VIEW_SIZE: list(self.renderer.shape[1:])}

    def build_model(self, config: ModelConfig, seed: int, *, headless: bool = False) -> nn.Module:
        """Build a network for these images and classes, or without a classifier, initialized with `seed`."""
        return build_for_classes(
            config,
            () if headless or self.of_embeddings else self.train_set.class_names,
            in_channels=self.train_set.in_channels,
            image_size=self.image_shape[1:],
            seed=seed,
            notify=partial(self.monitor.warn_once, "model"),
            task=self.train_set.task,
        )

    def view_identity(self) -> dict[str, Any]:
        """Return the identity of the views, for stores and jobs."""
        return self.renderer.identity

    def student_views(self) -> dict[str, Any]:
        """Return the identity of the views that a student sees, epoch by epoch."""
        return {**self.view_identity(), "num_views": self.views.num_views, "replay": self.views.replay}

    @cached_property
    def samples(self) -> Samples:
        """The ids, labels and pixel checksums of the training samples, in order; computed once from all pixels."""
        return samples_of(self.train_set)

    def data_identity(self) -> dict[str, Any]:
        """Return the identity of the training samples, for stores, whatever labels are used."""
        return digest(self.train_set) | self.samples.digests()

    def training_identity(self) -> dict[str, Any]:
        """Return the identity of the training samples with the labels that are used, for jobs."""
        return self.data_identity() | kept_labels(self.train_set)

    def test_identity(self) -> dict[str, Any]:
        """Return the identity of the test samples, which determine a job's results."""
        found = digest(self.test_set) | samples_of(self.test_set).digests() | kept_labels(self.test_set)
        return found if self.validation_set is None else {**found, "validation": self.deciding.test_identity()}


def samples_of(image_set: ImageSet) -> Samples:
    """Return the ids, labels and pixel checksums of a data set, in order."""
    return Samples(image_set.sample_ids.numpy(), image_set.listed_labels.numpy(), pixel_checksums(image_set))


def test_image_size(context: StageContext) -> int | None:
    """Return the side to which test images are resized and cropped to match the views; None if they match already.

    Raises RecipeError if the views are not square.
    """
    _, height, width = context.image_shape
    if context.train_set.image_size == (height, width):
        return None
    if height != width:
        raise RecipeError(
            f"the views are of {height} x {width} pixels and the images are not: test images can be resized to square "
            "views only; give the operation that sets the size a single number."
        )
    return height


def require_fitting_test_images(context: StageContext) -> None:
    """Raise RecipeError for impossible views, DataError for one class, or test images of other sizes or classes.

    So for validation images, if there are any.
    """
    if context.validation_set is not None:
        require_fitting_test_images(context.deciding)
    size, found = context.image_shape[1:], context.test_set.image_size
    which = "validation" if context.test_set.split == VALIDATION else "test"
    classes, others = context.train_set.class_names, context.test_set.class_names
    if len(classes) < 2 and context.train_set.task == CLASSIFICATION and context.train_set.has_labels:
        raise DataError(
            f"the images of {context.train_set.name} are all of one class, {classes[0]!r}: there is nothing to tell "
            "apart. If the classes are folders below that one, name it as the folder of the data."
        )
    if others != classes:
        raise DataError(
            f"the {which} images of {context.test_set.name} are of {len(others)} classes "
            f"({', '.join(others[:5])} ...), the training images of {len(classes)} ({', '.join(classes[:5])} ...): "
            "give both the same, in the same order."
        )
    if context.test_set.in_channels != context.train_set.in_channels:
        raise DataError(
            f"the {which} images of {context.test_set.name} have {context.test_set.in_channels} channels, the training "
            f"images {context.train_set.in_channels}: set data.channels, or convert one of them."
        )
    if found is None:
        raise DataError(unequal_sizes_message(context.test_set))
    if found != size:
        raise DataError(
            f"the {which} images of {context.test_set.name} are of {found[0]} x {found[1]} pixels, the training views "
            f"of {size[0]} x {size[1]}: set data.image_size (in Python image_size=), or add an operation to "
            f"the views that gives {found[0]} x {found[1]}."
        )


def model_normalization(
    image_set: ImageSet, model: ModelConfig | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Normalization:
    """Return a model's input scaling: the recipe's, that of its library's weights, or the training images' statistics.

    timm and transformers state one for the weights by name, whether they are downloaded or in a file.
    """
    if (mean is None) != (std is None):
        raise RecipeError("a model's mean and std must be given together.")
    if mean is not None and std is not None:
        if not len(mean) == len(std) == image_set.in_channels or min(std) <= 0:
            raise RecipeError(
                f"mean {list(mean)} and std {list(std)} do not fit images of {image_set.in_channels} channels: "
                "one number a channel, std above 0."
            )
        return Normalization(mean, std)
    if model is not None and (model.weights == PUBLISHED or (model.weights and prefix_of(model.name))):
        for stated in scaling_of_weights(model.name, image_set.in_channels).values():
            return stated
    return Normalization(*normalization(image_set))


def test_context(context: StageContext) -> StageContext:
    """Return the context with the unaugmented test images in place of the training images and their views."""
    return replace(context, train_set=context.test_set, views=Views(num_views=1), mix_partners=None)
