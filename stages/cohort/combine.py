"""Combine the logits of peers to one soft target: the four ways of KDCL, and the average of codistillation.

KDCL: Guo, Wang, Wu, Yu, Liang, Hu, Luo 2020, "Online Knowledge Distillation via Collaborative Learning", CVPR.
Codistillation: Anil, Pereyra, Passos, Ormandi, Dahl, Hinton 2018, "Large scale distributed neural network training
through online distillation", ICLR (arXiv 1804.03235).

Logits are [K, B, C], of K members for B samples; labels int64 [B]. All work in float32 or wider, without gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdpipe.stages.numerics import soften, to_float32

Combine = Literal["naive", "linear", "min_logit", "general"]

BARRIERS = tuple(0.1**n for n in range(8))
"""Weights of the logarithmic barrier of `linear_weights`, one Newton phase each: K times the last bounds the error."""

NEWTON_STEPS, NUM_SIZES = 4, 12
RIDGE = 1e-6


@torch.no_grad()
def combine(how: Combine, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return KDCL's target [B, C] of logits [K, B, C]; `weights` [K] are those of "general".

    Example:
        >>> logits = torch.tensor([[[3.0, 1.0]], [[5.0, 4.0]]])
        >>> combine("naive", logits, torch.tensor([0]), torch.ones(2))  # the first has the lower cross entropy
        tensor([[3., 1.]])
    """
    logits = to_float32(logits)
    if how == "naive":
        return naive(logits, labels)
    if how == "min_logit":
        return min_logit(logits, labels)
    if how == "linear":
        return torch.einsum("kb,kbc->bc", linear_weights(logits, labels).to(logits.dtype), logits)
    return torch.einsum("k,kbc->bc", weights.to(logits.dtype), logits)


def naive(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each sample the logits of the member with the least cross entropy; of several, the first."""
    losses = torch.stack([F.cross_entropy(one, labels, reduction="none") for one in logits])  # [K, B]
    return logits[losses.argmin(0), torch.arange(len(labels), device=labels.device)]


def min_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the element-wise minimum over the members of z - z[label]: 0 for the label, the least for each other."""
    own = logits.gather(2, labels[None, :, None].expand(len(logits), -1, 1))
    return (logits - own).amin(0)


def linear_weights(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each sample the convex weights [K, B], float64, that minimize the cross entropy of their mixture.

    The problem min over the simplex of CE(sum_k a_k z_k, y) is convex. An interior-point method solves it in float64:
    damped Newton steps with a barrier -t sum_k log a_k that shrinks to t = 1e-7. The cross entropy is within K t of
    the lowest.
    """
    own = logits.gather(2, labels[None, :, None].expand(len(logits), -1, 1))
    z = (logits - own).double().movedim(0, 1)  # [B, K, C], 0 for the label
    weights = torch.full(z.shape[:2], 1 / z.shape[1], dtype=z.dtype, device=z.device)
    for barrier in BARRIERS:
        for _ in range(NEWTON_STEPS):
            weights = _newton_step(z, weights, barrier)
    return weights.T


def _newton_step(z: Tensor, weights: Tensor, barrier: float) -> Tensor:
    """Return the weights after a damped Newton step within the simplex; those that it would not improve stay."""
    num = z.shape[1]
    mixed = torch.einsum("bk,bkc->bc", weights, z)
    p = mixed.softmax(1)
    mean = torch.einsum("bkc,bc->bk", z, p)
    centered = (z - mean[:, :, None]) * p.sqrt()[:, None]
    gradient = mean - barrier / weights
    system = z.new_zeros(len(z), num + 1, num + 1)  # the last row keeps the sum
    system[:, :num, :num] = centered @ centered.mT + torch.diag_embed(barrier / weights.square())
    system[:, :num, num] = system[:, num, :num] = 1
    right = torch.cat([-gradient, z.new_zeros(len(z), 1)], 1)
    step = torch.linalg.solve_ex(system, right)[0][:, :num]  # without a check, which would wait for a GPU
    room = torch.where(step < 0, -weights / step, torch.inf).amin(1)
    # Halved sizes, and 0 as the last: the first that does not raise the cross entropy with the barrier is taken.
    halves = F.pad(0.5 ** torch.arange(NUM_SIZES, dtype=z.dtype, device=z.device), (0, 1))
    sizes = (0.99 * room).clamp(max=1.0) * halves[:, None]  # [S, B]
    moved = weights + sizes[:, :, None] * step
    mixtures = mixed + sizes[:, :, None] * torch.einsum("bk,bkc->bc", step, z)
    values = mixtures.logsumexp(2) - barrier * moved.log().sum(2)
    chosen = (values <= values[-1]).int().argmax(0)
    found: Tensor = moved[chosen, torch.arange(len(z), device=z.device)]
    return found


def general_weights(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the weights [K], float64, that minimize the squared error of an ensemble on held-out samples.

    C_ij is the mean over samples of (f_i - t) . (f_j - t), with probabilities f [K, N, classes] and one-hot labels t;
    the weights are the row sums of its inverse divided by their sum (Perrone and Cooper 1993), and may be negative. A
    small multiple of its trace is added to the diagonal, as equal members make it singular.
    """
    errors = probabilities.double() - F.one_hot(labels, probabilities.shape[2])
    covariance = torch.einsum("inc,jnc->ij", errors, errors) / len(labels)
    diagonal = RIDGE * covariance.diagonal().mean() + torch.finfo(torch.float64).tiny
    covariance = covariance + diagonal * torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    row_sums: Tensor = torch.linalg.solve(covariance, covariance.new_ones(len(covariance)))
    weights: Tensor = row_sums / row_sums.sum()
    return weights


@torch.no_grad()
def average(logits: Tensor, temperature: float) -> Tensor:
    """Return logits [B, C] whose softmax at `temperature` is the mean of the members' softmaxes there."""
    log_probabilities = F.log_softmax(soften(logits, temperature), dim=2)
    mean = log_probabilities.logsumexp(0) - math.log(len(logits))
    averaged: Tensor = temperature * mean
    return averaged.to(to_float32(logits).dtype)
