"""What the outputs of a network are: scores of exclusive classes or of independent labels, numbers, or an embedding."""

from __future__ import annotations

from typing import Literal

LabelTask = Literal["classification", "multilabel", "regression"]
"""What images are labeled with: one class; for each of K labels 0 or 1; or K numbers."""

Task = LabelTask | Literal["embedding"]
"""What a network's outputs are: for these labels, or an embedding, which needs none."""

CLASSIFICATION: LabelTask = "classification"
MULTILABEL: LabelTask = "multilabel"
REGRESSION: LabelTask = "regression"
EMBEDDING: Task = "embedding"

LOSS_NAMES: dict[Task, str] = {
    CLASSIFICATION: "cross_entropy",
    MULTILABEL: "cross_entropy",
    REGRESSION: "mse",
    EMBEDDING: "cosine_mse",
}
"""Names of the mean loss in results: of labels the binary cross entropy, of embeddings that of pairwise cosines."""
