"""What every stage works with: the samples, the views, the device, the run folder, and who watches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stages.datasets.image_set import ImageSet, digest, normalisation, pixel_checksums, unequal_sizes_message
from stages.errors import DataError, RecipeError
from stages.evaluate import Evaluation
from stages.lesson import Normalisation
from stages.models.build import ModelConfig, architecture, build_model
from stages.pictures import Pictures
from stages.processes import ONE, Processes
from stages.views.config import ViewsConfig
from stages.views.renderer import Renderer
from stages.watch import Watch
from store import Samples

IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Setup:
    """The common ground of a run's stages; `run` is the folder in which they find each other's files.

    partners: where the partners of MixUp and CutMix come from; the training images, where that is None.
    num_workers, unreadable: as in the recipe's `data` section. ask_teacher: gives what the teachers say of the test
    images, float32 [N, C], where that is known by now. processes: who trains together; the first of them writes.
    """

    run: Path
    train_set: ImageSet
    test_set: ImageSet
    views: ViewsConfig
    device: torch.device
    watch: Watch
    partners: ImageSet | None = None
    num_workers: int | None = None
    unreadable: Literal["stop", "drop"] = "stop"
    ask_teacher: Callable[[], Tensor | None] = lambda: None
    processes: Processes = ONE

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the networks see."""
        return self.renderer.shape

    @cached_property
    def renderer(self) -> Renderer:
        """What makes the views of the training images."""
        held, population = self.train_set, self.partners or self.train_set
        partners = torch.sort(population.sample_ids).values
        if held.image_size is None and self.views.engine == "tensor":
            raise RecipeError(unequal_sizes_message(held))
        return Renderer(self.views, held.in_channels, held.image_size, partners)

    @cached_property
    def pictures(self) -> Pictures:
        """The training images in their views."""
        return Pictures(
            self.train_set, self.device, self.renderer, self.partners, self.num_workers, self._on_unreadable
        )

    @cached_property
    def test_pictures(self) -> Pictures:
        """The test images as they are."""
        return Pictures(self.test_set, self.device, num_workers=self.num_workers, on_failure=self._on_unreadable)

    def test(self, normalise: Normalisation) -> Evaluation:
        warn = partial(self.watch.warn, "evaluate")
        # One process alone must not leave what the others wait for.
        check = self.watch.check if self.processes.count == 1 else _go_on
        return Evaluation(self.test_pictures, normalise, self.ask_teacher(), warn, check)

    def _on_unreadable(self, sentence: str) -> None:
        """Stop at an image that cannot be read, or drop it from its batch and say so, as the recipe has it."""
        if self.unreadable == "stop":
            raise DataError(f"{sentence} (data.unreadable = 'drop' leaves such samples out)")
        self.watch.warn("data", f"{sentence} It is left out of this epoch.")

    def architecture(self, config: ModelConfig) -> dict[str, Any]:
        """The record from which a network for these images and classes can be built again."""
        held = self.train_set
        return architecture(config, held.num_classes, held.in_channels, self.image_shape[1:])

    def build(self, config: ModelConfig, seed: int) -> nn.Module:
        """A network for these images and classes, initialised from `seed`."""
        held = self.train_set
        return build_model(
            config,
            num_classes=held.num_classes,
            in_channels=held.in_channels,
            image_size=self.image_shape[1:],
            seed=seed,
        )

    def view_identity(self) -> dict[str, Any]:
        """The views, as a store and a job recognise them again."""
        return self.renderer.identity

    def shown_views(self) -> dict[str, Any]:
        """What a student sees, epoch by epoch."""
        return {**self.view_identity(), "num_views": self.views.num_views, "replay": self.views.replay}

    @cached_property
    def samples(self) -> Samples:
        """The ids, labels and pixel checksums of the training samples, in the data set's order: read once, as it takes
        a look at every pixel.
        """
        return samples_of(self.train_set)

    def data_identity(self) -> dict[str, Any]:
        """The training samples, as a store and a job recognise them again."""
        return digest(self.train_set) | self.samples.digests()

    def test_identity(self) -> dict[str, Any]:
        """The test samples: they decide a job's figures, if not its weights."""
        return digest(self.test_set) | samples_of(self.test_set).digests()


def _go_on() -> None:
    pass


def samples_of(image_set: ImageSet) -> Samples:
    """The ids, labels and pixel checksums of a data set, in its order."""
    return Samples(image_set.sample_ids.numpy(), image_set.labels.numpy(), pixel_checksums(image_set))


def test_size(setup: Setup) -> int | None:
    """To how many pixels the test images are cropped and resized, for the networks that see the views; None where they
    are as the recipe's `data` section has them. Raises RecipeError where no square fits.
    """
    _, height, width = setup.image_shape
    if setup.train_set.image_size == (height, width):
        return None
    if height != width:
        raise RecipeError(
            f"the views are of {height} x {width} pixels and the images are not: test images are made to fit square "
            "views only; give the operation that sets the size one number."
        )
    return height


def require_fitting_test_images(setup: Setup) -> None:
    """Raise RecipeError for what the views cannot do, DataError where test images are not as large as views are."""
    size, found = setup.image_shape[1:], setup.test_set.image_size
    classes, others = setup.train_set.class_names, setup.test_set.class_names
    if others != classes:
        raise DataError(
            f"the test images of {setup.test_set.name} are of {len(others)} classes ({', '.join(others[:5])} ...), the "
            f"training images of {len(classes)} ({', '.join(classes[:5])} ...): give both the same, in the same order."
        )
    if found is None:
        raise DataError(unequal_sizes_message(setup.test_set))
    if found != size:
        raise DataError(
            f"the test images of {setup.test_set.name} are of {found[0]} x {found[1]} pixels, what the networks learn "
            f"from is of {size[0]} x {size[1]}: set data.image_size, or have an operation give that size."
        )


def model_normalisation(
    image_set: ImageSet, weights: str | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Normalisation:
    """How a model scales its input: as the recipe says, as published weights want it, or by the training images."""
    if (mean is None) != (std is None):
        raise RecipeError("a model's mean and std are given together or not at all.")
    if mean is not None and std is not None:
        if not len(mean) == len(std) == image_set.in_channels or min(std) <= 0:
            raise RecipeError(
                f"mean {list(mean)} and std {list(std)} do not fit images of {image_set.in_channels} channels: "
                "one number a channel, std above 0."
            )
        return Normalisation(mean, std)
    if weights == "published" and image_set.in_channels == 3:
        return IMAGENET
    return Normalisation(*normalisation(image_set))


def deciding(config: Any) -> Mapping[str, Any]:
    """A config section as JSON, without what cannot change a result."""
    return {key: value for key, value in asdict(config).items() if key != "checkpoint_every_s"}
