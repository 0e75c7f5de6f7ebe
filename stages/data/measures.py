"""Losses and measures of a network's outputs, by what they are: `kdpipe.stages.data.tasks`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdpipe.stages.data.tasks import CLASSIFICATION, EMBEDDING, MULTILABEL, REGRESSION, Task


def target_losses(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each sample, [B], the mean over its K outputs: binary cross entropy, or squared error.

    Args:
        task: MULTILABEL or REGRESSION.
        outputs: Logits or numbers [B, K].
        targets: float32 [B, K], 0 or 1 of labels; NaN where it is not known, which counts as 0.
    """
    outputs, known = outputs.float(), ~targets.isnan()
    filled = torch.where(known, targets, 0.0)
    elementwise = F.binary_cross_entropy_with_logits if task == MULTILABEL else F.mse_loss
    return torch.where(known, elementwise(outputs, filled, reduction="none"), 0.0).mean(1)


def divergences(task: Task, expected: Tensor, found: Tensor) -> Tensor:
    """Return how far outputs are from the expected ones, [B], of [B, K].

    KL(expected || found) of the softmax in nats; the sum over the labels of that of the sigmoids; the mean squared
    error; of embeddings 1 - cosine.
    """
    expected, found = expected.double(), found.double()
    if task == REGRESSION:
        return (expected - found).square().mean(1)
    if task == EMBEDDING:
        return 1 - F.cosine_similarity(expected, found)
    if task == MULTILABEL:
        return binary_kl(expected, found).sum(1)
    return F.kl_div(found.log_softmax(1), expected.log_softmax(1), reduction="none", log_target=True).sum(1)


def binary_kl(expected: Tensor, found: Tensor) -> Tensor:
    """Return KL(sigmoid(expected) || sigmoid(found)) of each logit, in nats, exact for large logits."""
    probability = expected.sigmoid()
    present = F.logsigmoid(expected) - F.logsigmoid(found)
    absent = F.logsigmoid(-expected) - F.logsigmoid(-found)
    return probability * present + (1 - probability) * absent


def agreement(task: Task, expected: Tensor, found: Tensor) -> float:
    """Return how far two networks' outputs [N, K] agree, 1 at most.

    The share of samples of the same class; of samples and labels that are decided alike; of the variance of the
    expected numbers that is explained, at least 0; or the mean cosine of their embeddings.
    """
    if task == REGRESSION:
        return max(0.0, r2(expected, found))
    if task == EMBEDDING:
        return 1 - float(divergences(task, expected, found).mean())
    same = expected.argmax(1) == found.argmax(1) if task == CLASSIFICATION else (expected > 0) == (found > 0)
    return int(same.sum()) / same.numel()


def r2(targets: Tensor, found: Tensor) -> float:
    """Return the share of the variance of targets that is explained, mean over the outputs: R^2 = 1 - SSE / SST.

    Both are [N, K]; targets of NaN are left out. As in scikit-learn, a constant target counts 1 if it is met exactly,
    else 0.
    """
    from sklearn.metrics import r2_score

    scores = []
    for column, other in zip(targets.double().T, found.double().T, strict=True):
        known = ~column.isnan()
        if int(known.sum()) > 1:
            scores.append(r2_score(column[known].numpy(), other[known].numpy()))
    return float(sum(scores) / len(scores)) if scores else 0.0


def mean_average_precision(targets: Tensor, logits: Tensor) -> tuple[float, list[float | None]]:
    """Return the mean of the average precisions of the labels, and each; None where no sample has that label.

    Both are [N, K]; targets of NaN are left out.
    """
    from sklearn.metrics import average_precision_score

    found: list[float | None] = []
    for column, scores in zip(targets.T, logits.T, strict=True):
        known = ~column.isnan()
        some = column[known] == 1
        found.append(float(average_precision_score(some.numpy(), scores[known].numpy())) if some.any() else None)
    present = [one for one in found if one is not None]
    return sum(present) / len(present) if present else 0.0, found
