"""The example in the docstring of the base classes works as written."""

import inspect
from typing import ClassVar, Literal

import torch
from support.loss_inputs import DATASET, STUDENT_LOGITS, TEACHER_LOGITS, make_inputs
from torch import Tensor

from kdpipe.stages.config import section
from kdpipe.stages.losses import base
from kdpipe.stages.losses.describe import attributes_of, description_of


def example_config():
    """Return the configuration class of the docstring's example."""
    names = {**vars(base), "section": section, "ClassVar": ClassVar, "Literal": Literal, "Tensor": Tensor}
    exec(inspect.cleandoc(base.__doc__.partition("Example:\n")[2]), names)
    return names["LogitMAEConfig"]


def test_example_computes_one_value_per_sample():
    module = example_config()(loss="logit_mae", margin=0.5).build({}, {}, DATASET)
    errors = (STUDENT_LOGITS - TEACHER_LOGITS).abs() - 0.5
    assert torch.allclose(module(make_inputs()), errors.clamp(min=0).mean(1))


def test_example_documents_its_keys():
    config = example_config()
    assert description_of(config) == "Mean absolute error between the logits of student and teacher."
    assert attributes_of(config)["margin"] == "errors up to this size are ignored."
    assert set(attributes_of(config)) == {"weight", "store", "samples", "standardize", "margin"}
