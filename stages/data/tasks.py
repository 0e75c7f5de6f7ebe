"""What the outputs of a network are: scores of classes that exclude each other, of independent labels, or numbers."""

from __future__ import annotations

from typing import Literal

Task = Literal["classification", "multilabel", "regression"]
"""What images are labeled with: one class; for each of K labels 0 or 1; or K numbers."""

CLASSIFICATION: Task = "classification"
MULTILABEL: Task = "multilabel"
REGRESSION: Task = "regression"

LOSS_NAMES = {CLASSIFICATION: "cross_entropy", MULTILABEL: "cross_entropy", REGRESSION: "mse"}
"""Names of the mean loss in results: of labels the binary cross entropy."""
