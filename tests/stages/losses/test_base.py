"""The example in the docstring of the base classes works as written."""

import inspect
from typing import ClassVar

import torch
from support.loss_inputs import DATASET, STUDENT_LOGITS, TEACHER_LOGITS, make_inputs

from kdpipe.stages.losses import base
from kdpipe.stages.losses.describe import attributes_of, description_of
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
    assert set(attributes_of(config)) == {"weight", "store", "samples", "standardize", "margin"}
