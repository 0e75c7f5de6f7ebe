"""Classify embeddings by their nearest neighbors among labeled ones, as self-supervised networks are evaluated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

K = 20

TEMPERATURE = 0.07
"""Both as in DINO: Caron et al. 2021, arXiv 2104.14294."""

SMALLEST_VOTE = 1e-12
"""The votes for a class without neighbors, whose logarithm is finite."""

BLOCK = 2**24
"""Cosines that are computed at once: 64 MiB."""


class KNN:
    """Weighted k nearest neighbors by cosine.

    Each of the k neighbors votes for its class with exp(cosine / 0.07).
    """

    def __init__(self, vectors: Tensor, labels: Tensor, num_classes: int) -> None:
        """Keep labeled embeddings, float32 [N, D], with labels int64 [N]."""
        self.bank = F.normalize(vectors, dim=1)
        self.labels = labels.to(vectors.device)
        self.num_classes = num_classes
        self.k = min(K, len(vectors))

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Return the logarithms of the votes of each class, [B, num_classes], of embeddings [B, D].

        Example:
            >>> knn = KNN(torch.eye(2), torch.tensor([1, 0]), num_classes=2)
            >>> knn(torch.tensor([[3.0, 0.1]])).argmax(1)
            tensor([1])
        """
        size = max(1, BLOCK // len(self.bank))
        return torch.cat([self._votes(rows) for rows in torch.split(F.normalize(embeddings.float(), dim=1), size)])

    def _votes(self, rows: Tensor) -> Tensor:
        cosines, nearest = (rows.to(self.bank.device) @ self.bank.T).topk(self.k, dim=1)
        shares = ((cosines - 1) / TEMPERATURE).exp()
        classes = F.one_hot(self.labels[nearest], self.num_classes).to(
            shares.dtype
        )  # a fixed order, unlike scatter_add
        return (torch.einsum("bk,bkc->bc", shares, classes) + SMALLEST_VOTE).log()
