"""Noise-contrastive estimation between embeddings, and a memory bank of them: the parts of CRD (arXiv 1910.10699).

P = exp(v w / T) / Z is the likelihood that an anchor v and another network's embedding w are of the same image, against
the noise probability 1 / n of a sample drawn from the data set's n.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdpipe.stages.numerics import normalize_rows
from kdpipe.stages.runtime.collectives import all_gather_with_grad

EPS = 1e-7

Compared = tuple[Tensor, Tensor]
"""Embeddings of the anchors' own samples [B, D] (positives), and of other samples [K, D] (negatives)."""


class NCELoss(nn.Module):
    """The NCE loss of one network's anchors against the other's embeddings, with Z fixed by the first training batch.

    log Z is a buffer, NaN before the first batch.
    """

    log_z: Tensor

    def __init__(self, temperature: float, num_samples: int) -> None:
        super().__init__()
        self.temperature = temperature
        self.num_samples = num_samples
        self.register_buffer("log_z", torch.tensor(math.nan))

    def forward(
        self, anchors: Tensor, among: Compared, is_negative: Tensor, *, first_among: Compared | None = None
    ) -> Tensor:
        """Compute the loss of each anchor, [B], from embeddings [B, D]; `first_among` gives Z, if other than `among`.

        `is_negative`, bool [B, K], is which negatives count for each anchor.
        """
        same, negatives = self._products(anchors, among)
        measured = (same, negatives) if first_among is None else self._products(anchors, first_among)
        log_z = self._log_z(measured[0].detach(), measured[1].detach(), is_negative)
        return nce_loss(same - log_z, negatives - log_z, is_negative, self.num_samples)

    def _products(self, anchors: Tensor, among: Compared) -> tuple[Tensor, Tensor]:
        positives, negatives = among
        return (anchors * positives).sum(1) / self.temperature, anchors @ negatives.T / self.temperature

    def _log_z(self, same: Tensor, negatives: Tensor, is_negative: Tensor) -> Tensor:
        """Return the stored log Z, else this batch's, without a branch, which would synchronize the device."""
        current = log_z_of(same, negatives, is_negative, self.num_samples).to(self.log_z.dtype)
        log_z = torch.where(self.log_z.isnan(), current, self.log_z)
        if self.training:
            self.log_z.copy_(torch.where(log_z.isfinite(), log_z, self.log_z))
        return log_z


class Memory(nn.Module):
    """A memory bank: a buffer [N, D] with the embedding of each sample of the data set when it was last seen."""

    rows: Tensor

    def __init__(self, num_samples: int, dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self._overwritten: list[tuple[Tensor, Tensor]] = []
        self.register_buffer("rows", (torch.rand(num_samples, dim) * 2 - 1) / math.sqrt(dim / 3))

    @torch.no_grad()
    def update(self, ranks: Tensor, embedded: Tensor) -> None:
        """Update the rows of samples with ranks int64 [B] toward their embeddings [B, D], of all processes."""
        ranks, embedded = all_gather_with_grad(ranks), all_gather_with_grad(embedded.detach()).to(self.rows.dtype)
        old = self.rows[ranks]
        self._overwritten.append((ranks, old))
        updated = self.momentum * old + (1 - self.momentum) * embedded
        self.rows[ranks] = normalize_rows(updated)

    def begin_step(self) -> None:
        """Start recording updates, so that `undo` can undo them."""
        self._overwritten.clear()

    def undo(self) -> None:
        """Undo the updates since `begin_step`, without a copy of the whole bank."""
        while self._overwritten:
            ranks, rows = self._overwritten.pop()
            self.rows[ranks] = rows


def log_z_of(same: Tensor, negatives: Tensor, is_negative: Tensor, num_samples: int) -> Tensor:
    """Compute log Z, a scalar: Z is num_samples times the mean of exp(product) over the batch of all processes.

    The mean is taken over the positive and the counting negatives (`is_negative`, bool [B, K]) of each anchor, then
    over anchors. `same` [B] and `negatives` [B, K] are products of embeddings over T.
    """
    products = torch.cat([same[:, None], negatives.masked_fill(~is_negative, -math.inf)], dim=1)
    means = all_gather_with_grad(products.logsumexp(1) - (1 + is_negative.sum(1)).to(products.dtype).log())
    return means.logsumexp(0) - math.log(max(1, len(means))) + math.log(num_samples)


def nce_loss(log_same: Tensor, log_negatives: Tensor, is_negative: Tensor, num_samples: int) -> Tensor:
    """Compute -log P_+ / (P_+ + c) - sum_k log c / (P_k + c) of each anchor, [B].

    c = m / num_samples, with m the number of counting negatives. P + c is P + c + 1e-7, as in the authors' code; P
    itself, which may overflow, is not computed. `log_same` [B] is log P_+, `log_negatives` [B, K] log P_k, and
    `is_negative`, bool [B, K], which negatives count.

    Example:
        >>> nce_loss(torch.zeros(2), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), num_samples=3)
        tensor([2.7726, 2.7726])
    """
    noise = (is_negative.sum(1).to(log_same.dtype) / num_samples)[:, None]
    log_either = (noise + EPS).log()
    same = -F.logsigmoid(log_same - log_either[:, 0])
    negatives = -F.logsigmoid(log_either - log_negatives) + log_either - noise.log()
    return same + torch.where(is_negative, negatives, 0.0).sum(1)
