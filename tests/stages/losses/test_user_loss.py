"""Losses of users: functions, torch modules and classes, with their values, keys and faults."""

import linecache
from dataclasses import fields

import pytest
import torch
from support import user_losses
from support.loss_inputs import DATASET, LABELS, STUDENT_LOGITS, TEACHER_LOGITS, make_inputs
from torch import nn

from kdpipe.losses import KD, LogitLoss, LossInputs, SampleSelection
from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses.describe import attributes_of, find_loss
from kdpipe.stages.losses.user_loss import as_loss, try_loss

MAE = as_loss(user_losses.logit_mae, "mae")
SPREAD = as_loss(user_losses.batch_spread, "spread")
PROJECTED = as_loss(user_losses.Projected, "projected")
CLASS = as_loss(user_losses.LogitMAE, "class")
MEANS = as_loss(user_losses.ChannelMeans, "means")


@pytest.mark.parametrize("kind", [MAE, CLASS])
def test_function_and_class_give_the_same_values(kind):
    loss = kind(margin=0.5, weight=3.0)
    expected = user_losses.logit_mae(STUDENT_LOGITS, TEACHER_LOGITS, margin=0.5)
    assert torch.equal(loss.build({}, {}, DATASET)(make_inputs()), expected)
    assert loss(STUDENT_LOGITS, TEACHER_LOGITS) == 3 * expected.mean()


def test_one_value_for_the_batch_with_labels():
    assert (SPREAD.per_sample, SPREAD.one_label, MAE.per_sample, MAE.one_label) == (False, True, True, False)
    loss = SPREAD(weight=2.0)(STUDENT_LOGITS, TEACHER_LOGITS, LABELS)
    assert loss == 2 * user_losses.batch_spread(STUDENT_LOGITS, TEACHER_LOGITS, LABELS)
    with pytest.raises(RecipeError, match="needs the labels"):
        SPREAD()(STUDENT_LOGITS, TEACHER_LOGITS)


def test_module_has_parameters_and_the_number_of_classes():
    torch.manual_seed(0)
    module = PROJECTED(power=4).module(STUDENT_LOGITS.float(), TEACHER_LOGITS.float())
    torch.manual_seed(0)
    expected = user_losses.Projected(10, power=4)(STUDENT_LOGITS.float(), TEACHER_LOGITS.float())
    loss = module(STUDENT_LOGITS.float(), TEACHER_LOGITS.float())
    assert torch.equal(loss, expected.mean())
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert [field.name for field in fields(PROJECTED)][-1] == "power"
    with pytest.raises(RecipeError, match=r"Projected has parameters that train with the student: .*\.module\("):
        PROJECTED()(STUDENT_LOGITS.float(), TEACHER_LOGITS.float())


def test_half_precision_is_computed_in_float32():
    seen = []

    def recorded(student_logits, teacher_logits):
        seen.extend([student_logits.dtype, teacher_logits.dtype])
        return (student_logits - teacher_logits).abs().mean(1)

    student, teacher = STUDENT_LOGITS.half(), TEACHER_LOGITS.half()
    with torch.autocast("cpu", torch.bfloat16):
        loss = as_loss(recorded, "recorded")()(student, teacher)
    assert set(seen) == {torch.float32}
    assert loss == (student.float() - teacher.float()).abs().mean(1).mean()


def test_feature_loss_says_what_it_needs_stored():
    loss = MEANS([("a", "b")], scale=2.0)
    assert loss.student_layers() == ("a",)
    assert [str(feature) for feature in loss.required_features({})] == ["b:pooled"]
    student, teacher = {"a": torch.ones(2, 3, 4, 4)}, {"b": torch.ones(2, 5, 2, 2)}
    assert loss.module(student, teacher)(student, teacher).requires_grad


def test_keys_are_described_by_the_docstring():
    assert attributes_of(MAE)["margin"] == attributes_of(CLASS)["margin"] == "errors up to this size are ignored."
    described = find_loss("python:support.user_losses:logit_mae")
    own = [key for key in described.keys if key.shared_by is None]
    assert [(key.name, key.type, key.default) for key in own] == [("margin", "number", 0.0)]
    assert described.module == "support.user_losses"
    assert described.summary == "Mean absolute error of the logits."


def test_wrong_setting_is_one_sentence():
    with pytest.raises(RecipeError, match=r"^logit_mae has no setting 'margn'; did you mean 'margin'\?$"):
        MAE(margn=1.0)
    with pytest.raises(RecipeError, match=r"^logit_mae: margin = 'wide': it must be a number\.$"):
        MAE(margin="wide")


@pytest.mark.parametrize("result", [lambda s: s, lambda s: 3.0, lambda s: s.mean()])
def test_wrong_result_says_what_is_wanted(result):
    def odd(student_logits, teacher_logits):
        return result(student_logits)

    with pytest.raises(
        RecipeError, match=r"the loss odd returned (a tensor of shape .*one value for each sample, \[B\]|float)"
    ):
        as_loss(odd, "odd", per_sample=True)()(STUDENT_LOGITS, TEACHER_LOGITS)


def test_mistakes_show_before_a_training():
    def broken(student_logits, teacher_logits):
        return student_logits @ teacher_logits

    def untouched(student_logits, teacher_logits):
        return (student_logits - teacher_logits).square()

    for function, message in (
        (broken, r"it fails on a batch of logits \[4, 10\] \(RuntimeError"),
        (untouched, r"\[4, 10\]"),
    ):
        loss = as_loss(function, "wrong")()
        with pytest.raises(RecipeError, match=message):
            try_loss(loss, loss.build({}, {}, DATASET), {}, {}, 10)
    try_loss(MAE(), MAE().build({}, {}, DATASET), {}, {}, 10)


def test_samples_can_be_selected():
    wrong = TEACHER_LOGITS.argmax(1).clone()
    wrong[:2] = (wrong[:2] + 1) % 10
    loss = MAE(samples=SampleSelection(filter="correct"))(STUDENT_LOGITS, TEACHER_LOGITS, wrong)
    assert loss.item() == pytest.approx(user_losses.logit_mae(STUDENT_LOGITS, TEACHER_LOGITS)[2:].mean().item())


def takes_one(logits):
    return logits


def takes_key_by_position(student_logits, teacher_logits, margin):
    return student_logits - teacher_logits - margin


def has_untyped_key(student_logits, teacher_logits, *, margin=0.0):
    return student_logits - teacher_logits - margin


def has_taken_key(student_logits, teacher_logits, *, weight: float = 0.0):
    return student_logits - teacher_logits - weight


def has_unknown_type(student_logits, teacher_logits, *, margin: "Unheard"):  # noqa: F821
    return student_logits - teacher_logits - margin


class Lazy(LogitLoss):
    """A loss without compute."""


class Unreadable(LogitLoss):
    """A loss whose key has a type that recipes cannot have."""

    other: nn.Module

    def compute(self, inputs: LossInputs) -> torch.Tensor:
        return inputs.student.logits.sum(1)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (takes_one, r"takes \(logits\): it must take \(student_logits, teacher_logits\)"),
        (takes_key_by_position, r"its keys after a `\*`"),
        (has_untyped_key, "the key margin of the loss it has no type"),
        (has_taken_key, "cannot have a key 'weight', which every loss has"),
        (has_unknown_type, "the loss it cannot be used: NameError"),
        (Lazy, "computes nothing: override compute"),
        (Unreadable, "the loss it cannot be used: "),
        (print, "not a loss: it must be a class that derives from kdpipe.losses.Loss"),
        (int, "not a loss"),
        (3, "not a loss"),
    ],
)
def test_what_is_no_loss_is_refused(found, message):
    with pytest.raises(RecipeError, match=message):
        as_loss(found, "it")


def test_source_decides_a_job_unless_built_in():
    assert KD().source_digests() == {}
    digests = [kind().source_digests()["source_sha256"] for kind in (MAE, SPREAD, CLASS)]
    assert len(set(digests)) == 1  # that of the file
    assert len(digests[0]) == 64


def test_unregistered_class_says_how_to_name_it():
    with pytest.raises(RecipeError, match="LogitLoss has no name: decorate the class with @kd.register_loss"):
        LogitLoss()


def test_unregistered_subclass_of_a_loss_has_its_own_source():
    class Mine(KD):
        def compute(self, inputs):
            return 2 * super().compute(inputs)

    assert Mine().source_digests()
    assert torch.equal(Mine()(STUDENT_LOGITS, TEACHER_LOGITS), 2 * KD()(STUDENT_LOGITS, TEACHER_LOGITS))


CELL = """
class Mine(LogitLoss):
    def compute(self, inputs):
        return {factor} * inputs.student.logits.sum(1)
"""


def test_class_in_a_notebook_counts_by_its_own_source():
    def digest(factor, before=""):
        code = before + CELL.format(factor=factor)
        name = f"<cell {factor} {len(before)}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        names = {"LogitLoss": LogitLoss, "__name__": "__main__"}
        exec(compile(code, name, "exec"), names)
        return as_loss(names["Mine"], "mine")().source_digests()

    assert digest(2) == digest(2, before="print\n") != digest(3)
