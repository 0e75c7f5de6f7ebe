"""The example in the docstring of the base classes works as written; too few classes are refused."""

import inspect
from typing import ClassVar

import pytest
import torch
from support.loss_inputs import DATASET, STUDENT_LOGITS, TEACHER_LOGITS, make_inputs

from kdpipe.stages.errors import RecipeError
from kdpipe.stages.losses import base
from kdpipe.stages.losses.describe import attributes_of, description_of
from kdpipe.stages.losses.logits.dist import DIST
from kdpipe.stages.losses.logits.dkd import DKD
from kdpipe.stages.losses.logits.kd import KD, LogitMSE
from kdpipe.stages.losses.logits.mlld import MLLD
from kdpipe.stages.losses.logits.nkd import NKD
from kdpipe.stages.losses.user_loss import as_loss


def example():
    """Return the class of the docstring's example."""
    names = {**vars(base), "register_loss": lambda kind: as_loss(kind, "logit_mae"), "ClassVar": ClassVar}
    exec(inspect.cleandoc(base.__doc__.partition("Example:\n")[2]), names)
    return names["LogitMAE"]


def test_example_computes_one_value_per_sample():
    module = example()(margin=0.5).build({}, {}, DATASET)
    errors = (STUDENT_LOGITS - TEACHER_LOGITS).abs() - 0.5
    assert torch.allclose(module(make_inputs()), errors.clamp(min=0).mean(1))


def test_example_documents_its_keys():
    config = example()
    assert description_of(config) == "Mean absolute error between the logits of student and teacher."
    assert attributes_of(config)["margin"] == "errors up to this size are ignored."
    common = {"weight", "store", "samples", "view", "target_view", "target", "standardize", "rest"}
    assert set(attributes_of(config)) == {*common, "margin"}


@pytest.mark.parametrize(
    ("loss", "least"),
    [(KD(), 2), (KD(standardize=True), 3), (LogitMSE(), 1), (LogitMSE(standardize=True), 3), (DIST(), 2), (MLLD(), 2)],
)
def test_too_few_classes_are_refused(loss, least):
    loss.require_classes(least)
    with pytest.raises(RecipeError, match=f"{loss.loss}.* needs at least {least} classes, and there are {least - 1}"):
        loss.require_classes(least - 1)
    if least > 1:
        with pytest.raises(RecipeError, match=f"needs at least {least} classes"):
            loss(torch.randn(4, least - 1), torch.randn(4, least - 1))


@pytest.mark.parametrize("loss", [KD(), DKD(), NKD(), DIST(), MLLD()])
def test_the_fewest_classes_give_a_gradient(loss):
    student = torch.tensor([[1.0, -1.0], [0.5, 0.0], [0.0, 0.3]], requires_grad=True)
    loss(student, torch.tensor([[-1.0, 2.0], [0.1, 0.0], [0.0, 3.0]]), torch.tensor([1, 0, 0])).backward()
    assert (student.grad.abs().sum(1) > 0).all()
