"""Noise-contrastive estimation between embeddings, and a memory of them: the parts of CRD (arXiv 1910.10699).

How likely an anchor v and another network's embedding w are of the same picture is P = exp(v w / T) / Z, against 1 / n
for a sample drawn from the data set's n.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.losses.global_batch import gathered
from stages.losses.unit_rows import unit_rows

EPS = 1e-7

Compared = tuple[Tensor, Tensor]
"""Embeddings of the anchors' own samples, [B, D], and of others, [K, D]."""


class Contrast(nn.Module):
    """Anchors of one network against the embeddings of the other, with Z as it was for the first batch in training.

    Z is kept with the weights, as a logarithm: NaN as long as there was no batch.
    """

    log_z: Tensor

    def __init__(self, temperature: float, num_samples: int) -> None:
        super().__init__()
        self.temperature = temperature
        self.num_samples = num_samples
        self.register_buffer("log_z", torch.tensor(math.nan))

    def forward(
        self, anchors: Tensor, among: Compared, is_other: Tensor, *, first_among: Compared | None = None
    ) -> Tensor:
        """anchors: [B, D]; among: what they are compared with; is_other: bool [B, K], who counts for an anchor. To [B].

        first_among: what Z is taken from, where that is something else.
        """
        of_same, of_others = self._products(anchors, among)
        measured = (of_same, of_others) if first_among is None else self._products(anchors, first_among)
        log_z = self._log_z(measured[0].detach(), measured[1].detach(), is_other)
        return nce_per_sample(of_same - log_z, of_others - log_z, is_other, self.num_samples)

    def _products(self, anchors: Tensor, among: Compared) -> tuple[Tensor, Tensor]:
        positives, negatives = among
        return (anchors * positives).sum(1) / self.temperature, anchors @ negatives.T / self.temperature

    def _log_z(self, of_same: Tensor, of_others: Tensor, is_other: Tensor) -> Tensor:
        """The one that was kept, else this batch's; without a branch, for which the device would have to be waited."""
        fresh = log_z_of(of_same, of_others, is_other, self.num_samples).to(self.log_z.dtype)
        log_z = torch.where(self.log_z.isnan(), fresh, self.log_z)
        if self.training:
            self.log_z.copy_(torch.where(log_z.isfinite(), log_z, self.log_z))
        return log_z


class Memory(nn.Module):
    """An embedding of each sample of the data set, as it was when it was seen, float32 [N, D] kept with the weights."""

    rows: Tensor

    def __init__(self, num_samples: int, dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self._before: list[tuple[Tensor, Tensor]] = []
        self.register_buffer("rows", (torch.rand(num_samples, dim) * 2 - 1) / math.sqrt(dim / 3))

    @torch.no_grad()
    def remember(self, ranks: Tensor, embedded: Tensor) -> None:
        """Move the rows of samples, int64 [B], towards their embeddings, [B, D], of all processes."""
        ranks, embedded = gathered(ranks), gathered(embedded.detach()).to(self.rows.dtype)
        before = self.rows[ranks]
        self._before.append((ranks, before))
        mixed = self.momentum * before + (1 - self.momentum) * embedded
        self.rows[ranks] = unit_rows(mixed)

    def begin_step(self) -> None:
        """What is remembered from here on can be taken back."""
        self._before.clear()

    def take_back(self) -> None:
        """Have the rows as they were at the last `begin_step`: a copy of all of them would be large."""
        while self._before:
            ranks, rows = self._before.pop()
            self.rows[ranks] = rows


def log_z_of(of_same: Tensor, of_others: Tensor, is_other: Tensor, num_samples: int) -> Tensor:
    """The logarithm of Z: num_samples times the mean of exp over the batch of all processes; a scalar.

    of_same [B] and of_others [B, K] are products over T; the mean is over what counts for an anchor, then over anchors.
    """
    products = torch.cat([of_same[:, None], of_others.masked_fill(~is_other, -math.inf)], dim=1)
    means = gathered(products.logsumexp(1) - (1 + is_other.sum(1)).to(products.dtype).log())
    return means.logsumexp(0) - math.log(max(1, len(means))) + math.log(num_samples)


def nce_loss(log_same: Tensor, log_others: Tensor, is_other: Tensor, num_samples: int) -> Tensor:
    """The mean over anchors of -log P_+ / (P_+ + c) - sum_k log c / (P_k + c); a scalar.

    log_same: log P_+ of the embedding of the same sample, [B]. log_others: log P_k of those of others, [B, K], of which
    only those count where is_other, bool [B, K], is set. c = m / num_samples, m being the number that count.
    """
    return nce_per_sample(log_same, log_others, is_other, num_samples).mean()


def nce_per_sample(log_same: Tensor, log_others: Tensor, is_other: Tensor, num_samples: int) -> Tensor:
    """`nce_loss` of each anchor, [B]. P + c is P + c + 1e-7, as in the authors' code; P itself, which may be beyond a
    float, is not computed.
    """
    noise = (is_other.sum(1).to(log_same.dtype) / num_samples)[:, None]
    log_either = (noise + EPS).log()
    same = -F.logsigmoid(log_same - log_either[:, 0])
    others = -F.logsigmoid(log_either - log_others) + log_either - noise.log()
    return same + torch.where(is_other, others, 0.0).sum(1)
