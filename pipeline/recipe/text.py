"""The text of a new recipe: TOML with comments that say why each key stands there, from what people answered."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.recipe.habits import DIGITS, GREY, Habit, habit_of
from stages.list_losses import find_loss

TRAINED_HERE = "train"
"""The answer that stands for a teacher without given weights."""

FEATURE_LOSSES = ("hint", "at", "rkd")
OFFERED_LOSSES = ("kd", "dkd", "dist", "nkd", *FEATURE_LOSSES)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What `kdpipe recipe new` asks. teacher_weights: "train", "published" or a file. layers: the student's and the
    teacher's, of losses on features. prune_ratio: 0 for no pruning. channels: where the networks want others than the
    images have. file: where the recipe goes.
    """

    file: str
    name: str
    data: str
    root: str
    image_size: int | None
    teacher: str
    teacher_weights: str
    student: str
    losses: tuple[str, ...]
    layers: tuple[str, str] | None
    num_seeds: int
    compress: bool
    prune_ratio: float
    channels: int | None = None

    @property
    def kind(self) -> str:
        return self.data.partition(":")[0]


def recipe_text(answers: Answers) -> str:
    """The recipe as a TOML file's text."""
    sections = (_head, _data, _views, _networks, _distill, _compress)
    return "\n\n".join("\n".join(lines(answers)) for lines in sections) + "\n"


def toml_value(value: Any) -> str:
    """`value` as TOML writes it, on one line, whatever strings hold."""
    if isinstance(value, str):
        quoted = json.dumps(value, ensure_ascii=False)
        return "".join(f"\\u{ord(letter):04X}" if ord(letter) == 0x7F else letter for letter in quoted)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, Sequence):
        return f"[{', '.join(toml_value(inner) for inner in value)}]"
    return json.dumps(value)


def _line(key: str, value: Any, why: str) -> str:
    return f"{f'{key} = {toml_value(value)}':<26}  # {why}"


def _head(answers: Answers) -> Iterator[str]:
    file = shlex.quote(answers.file) if answers.file.isprintable() else "this file"
    yield f"# {answers.name}: a {answers.student} learns from a {answers.teacher}."
    yield "#"
    yield f"# Command:   kdpipe run {file}"
    yield "# Hardware:  not measured yet: say here what it ran on"
    yield f"# Time:      not measured yet: `kdpipe plan {file}` estimates what caching takes"
    yield "# Expect:    not measured yet: `kdpipe report` prints the table of a run"
    yield ""
    yield _line("name", answers.name, "also the run folder's: runs/NAME")
    yield _line("seed", 0, "of the teacher; each student has its own")
    if habit_of(answers.data) in (DIGITS, GREY):
        yield _line("num_threads", 1, "images this small only wait for a second thread")


def _data(answers: Answers) -> Iterator[str]:
    yield "[data]"
    yield _line("name", answers.data, "which images")
    if answers.kind != "digits":
        yield _line("root", answers.root, "where named sets lie, and where a relative path starts")
    if answers.kind in ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"):
        yield _line("download", True, "false: only what lies there already")
    if answers.kind == "digits":
        yield _line(
            "test_share", 0.5, "the set has no test split of its own: half of it, so that a point is nine images"
        )
    if answers.channels:
        yield _line("channels", answers.channels, "the networks take this many")
    if answers.image_size:
        yield _line("image_size", answers.image_size, "the largest centred square, resized to so many pixels")


def _views(answers: Answers) -> Iterator[str]:
    habit = habit_of(answers.data)
    yield "[views]"
    yield _line("num_views", habit.num_views, "augmented pictures cached of every image; 4 to 16 are where to begin")
    if answers.kind == "imagefolder":
        size = answers.image_size
        yield _line("engine", "transforms", "image by image in worker processes, as photographs need")
        yield "operations = ["
        yield f'  {{ name = "RandomResizedCrop", size = {size}, scale = [0.35, 1.0] }},'
        yield '  { name = "RandomHorizontalFlip" },  # leave it out where left and right differ in meaning'
        yield "]"
        return
    flip = [{"name": "RandomHorizontalFlip"}] if habit.flips else []
    crop = {"name": "RandomCrop", "padding": habit.crop}
    yield _line("operations", [crop, *flip], "what may change without changing the class")


def _networks(answers: Answers) -> Iterator[str]:
    habit = habit_of(answers.data)
    teacher, student = _model(answers.teacher, habit.widths[0]), _model(answers.student, habit.widths[1])
    trained = answers.teacher_weights == TRAINED_HERE
    yield "[teacher]"
    if not trained:
        teacher["weights"] = answers.teacher_weights
    yield _line("model", teacher, "runs once; only what it says is kept")
    if trained:
        yield _line("train", _training(habit, habit.epochs[0]), "a better teacher is worth a longer training")
    elif answers.teacher_weights == "published":
        yield _line("train", _tuning(habit, 5, 0.005), "published weights know other classes: the last layer is fresh")
    else:
        yield "# without `train` the weights are taken as they are"
    yield ""
    yield "[student]"
    yield _line("model", student, "what is trained, made small and handed over")
    yield _line("train", _training(habit, habit.epochs[1]), "alone and distilled alike")
    yield _line("seeds", list(range(answers.num_seeds)), "one student alone and one distilled for each")
    yield _line("hard_label_weight", 0.1 if "kd" in answers.losses else 1.0, "of the labels, beside the losses below")


def _training(habit: Habit, epochs: int) -> dict[str, Any]:
    return {
        "epochs": epochs,
        "batch_size": habit.batch_size,
        "lr": 0.05,
        "nesterov": True,
        "warmup_epochs": 1 if epochs < 20 else 2,
    }


def _model(name: str, width: int) -> dict[str, Any]:
    return {"name": name, "args": {"width": width}} if name in ("cnn", "cnn_average") else {"name": name}


def _distill(answers: Answers) -> Iterator[str]:
    for number, loss in enumerate(answers.losses):
        if number:
            yield ""
        yield "[[distill]]"
        yield from _loss(loss, answers, habit_of(answers.data))


def _loss(loss: str, answers: Answers, habit: Habit) -> Iterator[str]:
    known = find_loss(loss)
    yield _line("loss", loss, f"{known.paper}; `kdpipe losses {loss}` explains its keys")
    if loss in FEATURE_LOSSES and answers.layers is not None:
        yield _line("layers", [list(answers.layers)], "student's, teacher's module")
    usual = next(key.default for key in known.keys if key.name == "weight")
    weight = 5.0 if loss == "hint" and habit in (DIGITS, GREY) else usual
    yield _line("weight", weight, "try a third and three times of it first, if the student gains little")
    if loss not in FEATURE_LOSSES:
        yield _line("temperature", habit.temperature, "how much the teacher's second thoughts count")
    if loss == "dkd":
        yield _line("warmup_epochs", min(20, habit.epochs[1] // 4), "until the loss has its weight")


def _compress(answers: Answers) -> Iterator[str]:
    habit = habit_of(answers.data)
    tune = max(1, habit.epochs[1] // 4), max(1, habit.epochs[1] // 8)
    yield "[compress]"
    if not answers.compress:
        yield _line("steps", [], "the student is handed on as it is")
        return
    if answers.prune_ratio:
        narrow = answers.student in ("cnn", "cnn_average")
        why = "the share of the channels that goes" + ("; layers this narrow end at any width" if narrow else "")
        prune: dict[str, Any] = {"ratio": answers.prune_ratio} | ({"round_to": 1} if narrow else {})
        yield _line("prune", prune, why)
        yield _line("prune_train", _tuning(habit, tune[0], 0.02), "wins back what pruning lost, by the same losses")
    else:
        yield _line("steps", ["quantize"], "no pruning")
    yield _line("quantize", {"calibration_batches": 8}, "from which the first ranges of activations are taken")
    yield _line("quantize_train", _tuning(habit, tune[1], 0.002), "on the grid of the integers, at a low rate")


def _tuning(habit: Habit, epochs: int, rate: float) -> dict[str, Any]:
    return {"epochs": epochs, "batch_size": habit.batch_size, "lr": rate}
