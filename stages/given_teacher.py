"""Check a teacher whose weights are taken as they are: its classifier, its input scaling and its accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kdpipe.stages.context import StageContext
from kdpipe.stages.data.image_files import ImageFiles
from kdpipe.stages.errors import NotLogitsError, RecipeError
from kdpipe.stages.evaluation.correct_images import outcome_of
from kdpipe.stages.evaluation.evaluate import Evaluation
from kdpipe.stages.evaluation.main_metric import ACCURACY, MAP, MUTUAL_KNN, R2, main_value, metric_of
from kdpipe.stages.evaluation.metrics import EvalReport
from kdpipe.stages.evaluation.trials import try_class_order, try_scalings
from kdpipe.stages.models.build import PUBLISHED, ModelConfig
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.libraries.by_name import num_published_classes, prefix_of, preprocessing_of_weights
from kdpipe.stages.models.normalization import IMAGENET, Normalization
from kdpipe.stages.numerics import PROBABILITIES
from kdpipe.stages.teacher import TeacherConfig, stated_by_weights
from kdpipe.stages.training.job_dir import read_json_file
from kdpipe.stages.workspace import RECIPE

ROUNDING = 0.0005
"""Expected accuracies are written in percent with one digit."""

CROP_MARGIN = 0.01
"""The largest difference between the crop of test images and that of the weights without a warning."""

ENOUGH_TO_TRY = 0.95
"""With an accuracy above it no other scaling is tried: it could not gain much."""


def require_given(config: TeacherConfig, teacher: ModelBundle, context: StageContext) -> None:
    """Check a teacher whose weights are taken as they are: its classifier is trained, its input scaling is known.

    Warns where the recipe's scaling is not the one that the weights state.

    Raises:
        RecipeError: The classifier is new, or the scaling is not known, or stated in two ways.
    """
    if config.train is not None:
        return
    if config.has_own_head and has_new_head(config.model, context.train_set.num_classes):
        raise RecipeError(
            f"the classifier of {_named(config.model)} is new and random, as they are of other classes than the data: "
            "train the teacher ([teacher.train]), take the rows of the data's classes (teacher.model.classes), or "
            "learn from its embeddings (teacher.output = 'embeddings')."
        )
    if config.mean is None and known_scaling(config.model, teacher.model, context) is None:
        raise RecipeError(
            f"the input scaling of {_named(config.model)} is not known, and a wrong one lowers the accuracy "
            "silently: set teacher.mean and teacher.std to those of its training, for pixels in [0, 1]; ImageNet's are "
            f"{IMAGENET}."
        )
    for where, other in stated_by_weights(config.model, teacher.model, context).items():
        if other != teacher.normalize:
            sentence = f"the teacher's input scaling is the recipe's, {teacher.normalize}; {where} states {other}."
            context.monitor.warn("train-teacher", sentence)
    _warn_of_preprocessing(config.model, context)


def _warn_of_preprocessing(config: ModelConfig, context: StageContext) -> None:
    """Warn where a library's weights are for images of another size, or of another crop: they are less accurate."""
    if config.weights is None or not (config.weights == PUBLISHED or prefix_of(config.name)):
        return
    wanted, found = preprocessing_of_weights(config.name), context.image_shape[1:]
    if wanted.size not in (None, found):
        height, width = wanted.size
        context.monitor.warn(
            "train-teacher",
            f"the weights of {config.name} are for images of {height} x {width} pixels, and these have "
            f"{found[0]} x {found[1]}: set data.image_size = {height} (student.image_size may be smaller).",
        )
    test = context.test_set
    if wanted.crop is not None and isinstance(test.images, ImageFiles) and abs(wanted.crop - test.crop) > CROP_MARGIN:
        context.monitor.warn(
            "train-teacher",
            f"the weights of {config.name} are published for the central {100 * wanted.crop:g} % of a test image "
            f"(resized {wanted.interpolation}), and data.test_crop is {test.crop:g}: unless the images are cropped "
            f"already, set data.test_crop = {wanted.crop:g}.",
        )


def known_scaling(config: ModelConfig, model: nn.Module, context: StageContext) -> Normalization | None:
    """Return the input scaling that a network or its weights state; None if they state none.

    Raises RecipeError if they state two.
    """
    stated = stated_by_weights(config, model, context)
    if len(set(stated.values())) > 1:
        found = "; ".join(f"{where}: {scaling}" for where, scaling in stated.items())
        raise RecipeError(f"{_named(config)} state two input scalings ({found}): set teacher.mean and teacher.std.")
    return next(iter(stated.values()), None)


def has_new_head(config: ModelConfig, num_classes: int) -> bool:
    """Return whether a network gets a new, random classifier: its weights are of other classes than the data."""
    return config.fresh_head or (
        config.weights == PUBLISHED
        and config.classes is None
        and num_published_classes(config.name, config.args) != num_classes
    )


def _named(config: ModelConfig) -> str:
    """Return what brings the weights, for messages."""
    if config.weights == PUBLISHED:
        return f"the published weights of {config.name}"
    return f"the weights {config.weights}" if config.weights else f"the network {config.name}"


def require_accuracy(config: TeacherConfig, teacher: ModelBundle, report: EvalReport, test: Evaluation) -> None:
    """Check a teacher's accuracy against `teacher.expected_accuracy`, and that of given weights against chance.

    Other input scalings and class orders are tried on a sample of the test images where given weights reach less than
    expected, or nothing is expected. Outputs that are probabilities are refused: stores hold logits.

    Raises:
        RecipeError: It is too low; the message says what was found.
    """
    if report.outputs == PROBABILITIES:
        raise NotLogitsError(
            "the teacher's outputs are probabilities (each row adds up to 1), and stores hold logits: return what goes "
            "into its softmax."
        )
    if report.metric in (MAP, R2):
        _require_metric(config, report)
        return
    if report.metric != ACCURACY:
        unchecked = "accuracy, input scaling and order of classes are not checked: no test image has a label"
        if report.metric == MUTUAL_KNN:
            unchecked = "embeddings are not checked: that takes labels of training and test images"
        if test.warn is not None:
            test.warn(f"the teacher's {unchecked}.")
        return
    reached = f"the teacher reaches {100 * report.top1:.2f} % of {report.num_samples:,} test images"
    if config.expected_accuracy is not None:
        if _reaches(report.top1, config.expected_accuracy, report.num_samples):
            return
        reached += f", {config.expected_accuracy:g} % were expected (teacher.expected_accuracy)"
    if config.train is not None:
        if config.expected_accuracy is not None:
            raise RecipeError(f"{reached}: train it for longer, or expect less. The training is kept.")
        return
    found = "" if config.is_headless else findings(teacher, report, test)
    if not found and config.expected_accuracy is None and not report.is_at_chance(1.0):
        return
    chance = f"; guessing would reach {100 * report.chance:.2f} %" if report.is_at_chance() else ""
    advice = found or (
        "No usual input scaling and no other order of the classes changes that on a sample: look at the weights, "
        "teacher.mean and teacher.std, data.image_size and data.test_crop."
    )
    raise RecipeError(
        f"{reached}{chance}. {advice} If it has no more than that, set teacher.expected_accuracy = "
        f"{100 * report.top1:.2f}."
    )


def _require_metric(config: TeacherConfig, report: EvalReport) -> None:
    """Raise RecipeError for a teacher of labels or numbers that is worse than expected, or no better than chance."""
    reached = (
        f"the teacher reaches {report.metric.title} {100 * report.top1:.2f} % of {report.num_samples:,} test images"
    )
    if config.expected_accuracy is not None:
        if report.top1 < config.expected_accuracy / 100 - ROUNDING:
            raise RecipeError(f"{reached}, {config.expected_accuracy:g} % were expected (teacher.expected_accuracy).")
    elif config.train is None and report.is_at_chance():
        raise RecipeError(
            f"{reached}, no more than guessing ({100 * report.chance:.2f} %): look at the weights, the order of its "
            "outputs, teacher.mean and teacher.std. If it has no more than that, set teacher.expected_accuracy = "
            f"{100 * report.top1:.2f}."
        )


def is_as_expected(config: TeacherConfig, run: Path, result: Mapping[str, Any]) -> bool:
    """Return whether the teacher of another run has the accuracy that `require_accuracy` would demand of it here."""
    if config.expected_accuracy is not None:
        count = outcome_of(result).num_images or 0  # results of an older kdpipe lack it
        return metric_of(result) != ACCURACY or (
            count > 0 and _reaches(main_value(result), config.expected_accuracy, count)
        )
    if config.train is not None:
        return True
    recipe = read_json_file(run / RECIPE) or {}  # given weights are examined where nothing is expected
    return bool((recipe.get("teacher") or {}).get("expected_accuracy", 0) is None)


def _reaches(accuracy: float, percent: float, num_samples: int) -> bool:
    """Return whether an accuracy is not clearly below the expected one."""
    expected = percent / 100
    sigma: float = (expected * (1 - expected) / num_samples) ** 0.5
    return accuracy >= expected - 3 * sigma - ROUNDING


def findings(teacher: ModelBundle, report: EvalReport, test: Evaluation) -> str:
    """Return what other input scalings and class orders would reach, in sentences; empty if no more."""
    if report.top1 > ENOUGH_TO_TRY:
        return ""
    scaling = try_scalings(teacher.model, test)
    order = None if scaling else try_class_order(teacher.model, test)
    return " ".join(str(finding) for finding in (scaling, order) if finding)
