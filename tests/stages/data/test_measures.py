import math

import pytest
import torch
from torch.nn import functional as F

from kdpipe.stages.data import measures, tasks

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.0, 1.0]])


def test_target_losses_are_those_of_torch_where_all_is_known():
    targets = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    for task, loss in ((tasks.MULTILABEL, F.binary_cross_entropy_with_logits), (tasks.REGRESSION, F.mse_loss)):
        assert torch.allclose(measures.target_losses(task, LOGITS, targets).mean(), loss(LOGITS, targets))


@pytest.mark.parametrize("task", [tasks.MULTILABEL, tasks.REGRESSION])
def test_unknown_targets_have_no_loss_and_no_gradient(task):
    logits = LOGITS.clone().requires_grad_()
    targets = torch.tensor([[1.0, torch.nan, 0.0], [torch.nan, torch.nan, torch.nan]])
    losses = measures.target_losses(task, logits, targets)
    losses.sum().backward()
    assert losses[1] == 0 and torch.equal(logits.grad != 0, ~targets.isnan())


def test_binary_kl_by_hand_and_of_large_logits():
    p, q = torch.tensor(0.8), torch.tensor(0.3)
    byhand = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert torch.allclose(measures.binary_kl(p.logit(), q.logit()), byhand)
    assert measures.binary_kl(torch.tensor(200.0), torch.tensor(-200.0)) == 200


def test_agreement_is_of_classes_decisions_or_variance():
    other = torch.tensor([[2.5, 3.0, 0.5], [-3.0, 0.5, 1.0]])
    assert measures.agreement(tasks.CLASSIFICATION, LOGITS, other) == 0.5
    assert measures.agreement(tasks.MULTILABEL, LOGITS, other) == 4 / 6
    assert measures.agreement(tasks.REGRESSION, LOGITS, LOGITS) == 1
    assert measures.agreement(tasks.REGRESSION, LOGITS, -9 * LOGITS) == 0


def test_r2_and_mean_average_precision_leave_unknown_targets_out():
    from sklearn.metrics import average_precision_score, r2_score

    generator = torch.Generator().manual_seed(0)
    targets, found = torch.randn(2, 40, 2, generator=generator).double()
    targets[:10, 1] = torch.nan
    byhand = (r2_score(targets[:, 0], found[:, 0]) + r2_score(targets[10:, 1], found[10:, 1])) / 2
    assert math.isclose(measures.r2(targets, found), byhand, rel_tol=1e-12)
    labels = (targets > 0).double().where(~targets.isnan(), torch.nan)
    labels = torch.cat([labels, torch.zeros(40, 1)], 1)
    mean, each = measures.mean_average_precision(labels, torch.cat([found, found[:, :1]], 1))
    first = average_precision_score(labels[:, 0], found[:, 0])
    second = average_precision_score(labels[10:, 1], found[10:, 1])
    assert each == [first, second, None] and math.isclose(mean, (first + second) / 2)


def test_divergences_follow_the_task():
    other = LOGITS.flip(1)
    soft = (LOGITS.softmax(1) * (LOGITS.log_softmax(1) - other.log_softmax(1))).sum(1)
    assert torch.allclose(measures.divergences(tasks.CLASSIFICATION, LOGITS, other).float(), soft, atol=1e-6)
    assert torch.allclose(
        measures.divergences(tasks.MULTILABEL, LOGITS, other), measures.binary_kl(LOGITS, other).sum(1).double()
    )
    assert torch.allclose(
        measures.divergences(tasks.REGRESSION, LOGITS, other), (LOGITS - other).square().mean(1).double()
    )
