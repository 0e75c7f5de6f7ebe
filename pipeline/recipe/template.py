"""Fill the template of a new recipe: TOML with a comment for each key, and defaults by data set."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdpipe.stages.data.names import FILE_KINDS, SHAPES

TRAINED_HERE, PUBLISHED = "train", "published"
"""The answers for a teacher that is trained by the recipe, and for torchvision's weights."""

STATED = "stated"
"""The answer for a teacher whose weights state their input scaling."""

NEW_CLASSIFIER = "none"
"""The answer for a teacher whose weights are of other classes than the data, and whose last layer is new."""

FEATURE_LOSSES = ("hint", "at", "rkd")
OFFERED_LOSSES = ("kd", "dkd", "dist", "nkd", *FEATURE_LOSSES)


@dataclass(frozen=True)
class DatasetDefaults:
    """Networks, training lengths and augmentation with which a recipe for a data set begins.

    Attributes:
        widths: Width of the teacher and of the student, for networks that take one.
        epochs: Epochs of the teacher and of the student.
        crop: Padding of the random crop.
        flips: Whether images are flipped horizontally.
    """

    teacher: str
    student: str
    widths: tuple[int, int]
    epochs: tuple[int, int]
    batch_size: int
    crop: int
    flips: bool
    num_views: int
    temperature: float = 4.0


DIGITS = DatasetDefaults("cnn", "cnn", (32, 6), (40, 40), 64, 1, False, 20)
GRAY = DatasetDefaults("cnn", "cnn", (32, 4), (6, 10), 128, 2, False, 8)
COLOR = DatasetDefaults("resnet32x4", "resnet8x4", (32, 8), (120, 120), 64, 4, True, 16)
PHOTOS = DatasetDefaults("torchvision:resnet50", "torchvision:mobilenet_v2", (32, 8), (30, 60), 64, 0, True, 8, 2.0)
OTHER = DatasetDefaults("cnn", "cnn", (32, 8), (30, 30), 128, 2, False, 8)

DEFAULTS = {
    "digits": DIGITS,
    "MNIST": GRAY,
    "FashionMNIST": GRAY,
    "CIFAR10": COLOR,
    "CIFAR100": COLOR,
    **dict.fromkeys(FILE_KINDS, PHOTOS),
}


def is_small_network(name: str) -> bool:
    """Return whether a network takes images of any size and channels, and has no published weights."""
    from kdpipe.stages.models.registry import SMALL_IMAGE_NETWORKS  # imports torch
    from kdpipe.stages.models.user_models import is_user_model

    return name in SMALL_IMAGE_NETWORKS or is_user_model(name)


@dataclass
class Answers:
    """The answers of `kdpipe recipe new`, filled in as the questions are asked; None where one does not apply.

    Attributes:
        file: Path of the recipe.
        teacher_weights: "train", "published" or a file.
        classes: "published", a file with the names of the weights' classes, or "none".
        normalization: Mean and std of the input of a teacher whose weights are a file; None if they state it.
        layers: The student's and the teacher's module, for losses on features.
        prune_ratio: 0 for no pruning.
    """

    file: str
    name: str = ""
    data: str = "digits"
    root: str | None = None
    image_size: int | None = None
    teacher: str = "cnn"
    teacher_weights: str = TRAINED_HERE
    classes: str | None = None
    normalization: tuple[Sequence[float], Sequence[float]] | None = None
    student: str = "cnn"
    losses: tuple[str, ...] = ()
    layers: tuple[str, str] | None = None
    seeds: int = 3
    compress: bool = True
    prune_ratio: float | None = None

    @property
    def kind(self) -> str:
        return self.data.partition(":")[0]

    @property
    def defaults(self) -> DatasetDefaults:
        return DEFAULTS.get(self.kind, OTHER)

    @property
    def channels(self) -> int | None:
        """3 where torchvision's networks get images that have 1 channel; None where the channels fit."""
        is_small = is_small_network(self.teacher) and is_small_network(self.student)
        return 3 if not is_small and SHAPES.get(self.data, (0, None, None))[1] == 1 else None


def recipe_text(answers: Answers) -> str:
    """Return the recipe as TOML."""
    sections = (_head, _data, _views, _networks, _distill, _compress)
    return "\n\n".join("\n".join(lines(answers)) for lines in sections) + "\n"


def toml_value(value: Any) -> str:
    """Return `value` as TOML on one line, with strings escaped."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, Sequence):
        return f"[{', '.join(toml_value(inner) for inner in value)}]"
    return json.dumps(value)


def _line(key: str, value: Any, comment: str) -> str:
    return f"{f'{key} = {toml_value(value)}':<26}  # {comment}"


def _head(answers: Answers) -> Iterator[str]:
    file = shlex.quote(answers.file) if answers.file.isprintable() else "this file"
    yield f"# {answers.name}: distill a {answers.teacher} into a {answers.student}."
    yield "#"
    yield f"# Command:   kdpipe run {file}"
    yield "# Hardware:  not measured yet: write down what it ran on"
    yield f"# Time:      not measured yet: `kdpipe plan {file}` estimates it"
    yield "# Expect:    not measured yet: `kdpipe report` prints the results of a run"
    yield ""
    yield _line("name", answers.name, "also the run folder: runs/NAME")
    yield _line("seed", 0, "of the teacher; each student has its own")
    if answers.defaults in (DIGITS, GRAY):
        yield _line("num_threads", 1, "a second thread does not speed up images this small")


def _data(answers: Answers) -> Iterator[str]:
    yield "[data]"
    yield _line("name", answers.data, "the data set")
    if answers.kind == "digits":
        yield _line("test_share", 0.5, "digits has no test split: half of it becomes one")
    else:
        yield _line("root", answers.root or "data", "folder of named data sets and of relative paths")
    if answers.kind in ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"):
        yield _line("download", True, "false: use only what is there already")
    if answers.channels:
        yield _line("channels", answers.channels, "the networks take this many")
    if answers.image_size:
        yield _line("image_size", answers.image_size, "crop the largest centered square, resize it to this many pixels")


def _views(answers: Answers) -> Iterator[str]:
    defaults = answers.defaults
    yield "[views]"
    yield _line("num_views", defaults.num_views, "augmented views cached of every image; start with 4 to 16")
    if answers.kind in FILE_KINDS:
        yield _line("engine", "transforms", "torchvision's transforms, image by image in worker processes")
        yield "operations = ["
        yield f'  {{ name = "RandomResizedCrop", size = {answers.image_size}, scale = [0.35, 1.0] }},'
        yield '  { name = "RandomHorizontalFlip" },  # leave it out where left and right differ in meaning'
        yield "]"
    else:
        flip = [{"name": "RandomHorizontalFlip"}] if defaults.flips else []
        crop = {"name": "RandomCrop", "padding": defaults.crop}
        yield _line("operations", [crop, *flip], "changes that keep the class")


def _networks(answers: Answers) -> Iterator[str]:
    defaults, weights = answers.defaults, answers.teacher_weights
    teacher, student = _model(answers.teacher, defaults.widths[0]), _model(answers.student, defaults.widths[1])
    yield "[teacher]"
    keeps_rows = answers.classes not in (None, NEW_CLASSIFIER)
    if weights != TRAINED_HERE:
        teacher["weights"] = weights
    if keeps_rows:
        teacher["classes"] = answers.classes
    elif answers.classes == NEW_CLASSIFIER:
        teacher["fresh_head"] = True
    yield _line("model", teacher, "runs once; its outputs are cached")
    if weights == TRAINED_HERE:
        yield _line("train", _training(defaults, defaults.epochs[0]), "a longer training gives a better teacher")
    elif answers.classes == NEW_CLASSIFIER or (weights == PUBLISHED and not keeps_rows):
        yield _line("train", _tuning(defaults, 5, 0.005), "the weights are for other classes: new last layer")
    if answers.normalization is not None:
        mean, std = answers.normalization
        yield _line("mean", list(mean), "of the teacher's training, for pixels in [0, 1]")
        yield _line("std", list(std), "a wrong scaling lowers the accuracy")
    yield ""
    yield "[student]"
    yield _line("model", student, "trained, compressed and exported")
    yield _line("train", _training(defaults, defaults.epochs[1]), "the same alone and distilled")
    yield _line("seeds", list(range(answers.seeds)), "one student alone and one distilled for each")
    yield _line("hard_label_weight", 0.1 if "kd" in answers.losses else 1.0, "of the labels, beside the losses below")


def _distill(answers: Answers) -> Iterator[str]:
    for number, loss in enumerate(answers.losses):
        yield from [""] * (number > 0)
        yield "[[distill]]"
        yield from _loss(loss, answers, answers.defaults)


def _loss(loss: str, answers: Answers, defaults: DatasetDefaults) -> Iterator[str]:
    from kdpipe.stages.losses.describe import find_loss

    description = find_loss(loss)
    yield _line("loss", loss, f"{description.paper}; `kdpipe losses {loss}` explains its keys")
    if loss in FEATURE_LOSSES and answers.layers is not None:
        yield _line("layers", [list(answers.layers)], "the student's and the teacher's module")
    usual = next(key.default for key in description.keys if key.name == "weight")
    weight = 5.0 if loss == "hint" and defaults in (DIGITS, GRAY) else usual
    yield _line("weight", weight, "if the student gains little, first try a third and three times as much")
    if loss not in FEATURE_LOSSES:
        yield _line("temperature", defaults.temperature, "higher: more weight on the classes other than the likeliest")
    if loss == "dkd":
        yield _line("warmup_epochs", min(20, defaults.epochs[1] // 4), "epochs until the loss has its full weight")


def _compress(answers: Answers) -> Iterator[str]:
    defaults = answers.defaults
    yield "[compress]"
    if not answers.compress:
        yield _line("steps", [], "export the student as it is")
        return
    if answers.prune_ratio:
        narrow = answers.student in ("cnn", "cnn_average")
        prune: dict[str, Any] = {"ratio": answers.prune_ratio} | ({"round_to": 1} if narrow else {})
        yield _line("prune", prune, "the fraction of the channels; round_to = 1: any width, for narrow layers")
        train = _tuning(defaults, max(1, defaults.epochs[1] // 4), 0.02)
        yield _line("prune_train", train, "recovers accuracy after pruning, with the same losses")
    else:
        yield _line("steps", ["quantize"], "no pruning")
    yield _line("quantize", {"calibration_batches": 8}, "to set the first ranges of activations")
    train = _tuning(defaults, max(1, defaults.epochs[1] // 8), 0.002)
    yield _line("quantize_train", train, "quantization-aware, at a low learning rate")


def _model(name: str, width: int) -> dict[str, Any]:
    return {"name": name, "args": {"width": width}} if name in ("cnn", "cnn_average") else {"name": name}


def _training(defaults: DatasetDefaults, epochs: int) -> dict[str, Any]:
    return _tuning(defaults, epochs, 0.05) | {"nesterov": True, "warmup_epochs": 1 if epochs < 20 else 2}


def _tuning(defaults: DatasetDefaults, epochs: int, rate: float) -> dict[str, Any]:
    return {"epochs": epochs, "batch_size": defaults.batch_size, "lr": rate}
