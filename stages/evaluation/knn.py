"""Judge embeddings by nearest neighbors: classify by labeled ones, or compare those of two networks without labels."""

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


MAX_COMPARED = 5_000
"""Images, at most, among which the neighbors of two networks are compared."""


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


def num_compared(num_images: int) -> tuple[int, int]:
    """Return among how many of some images neighbors are compared, and how many neighbors of each: a tenth, or K."""
    num = min(num_images, MAX_COMPARED)
    return num, max(1, min(K, (num - 1) // 10))


def mutual_knn(teacher: Tensor, student: Tensor) -> tuple[Tensor, float]:
    """Compare the neighborhoods of the same images in two networks' embeddings, of any widths.

    The mutual k-NN alignment of Huh et al. 2024, arXiv 2405.07987: the share of an image's k nearest neighbors by
    cosine among these images that are the same in both. Of more than MAX_COMPARED images some are taken, evenly spread.

    Args:
        teacher: The teacher's embeddings, float32 [N, D].
        student: The student's, float32 [N, E].

    Returns:
        The share for each image that was taken, float32 [n]; and the mean squared difference of the cosines of pairs.

    Example:
        >>> vectors = torch.eye(12) + 0.1 * torch.arange(12)
        >>> mutual_knn(vectors, 2 * vectors)[0].mean()
        tensor(1.)
    """
    num, k = num_compared(len(teacher))
    chosen = torch.linspace(0, len(teacher) - 1, num, dtype=torch.float64).round().long()
    both = [F.normalize(vectors.float()[chosen], dim=1) for vectors in (teacher, student)]
    shares, squares = [], torch.zeros((), dtype=torch.float64)
    for rows in torch.split(torch.arange(num), max(1, BLOCK // num)):
        cosines = [vectors[rows] @ vectors.T for vectors in both]
        squares += (cosines[0] - cosines[1]).square().sum(dtype=torch.float64)
        for each in cosines:
            each[torch.arange(len(rows)), rows] = -torch.inf  # no image is its own neighbor
        first, second = (each.topk(min(k, num - 1), dim=1).indices for each in cosines)
        shares.append((first[:, :, None] == second[:, None, :]).sum((1, 2)).float() / k)
    return torch.cat(shares), float(squares / num**2)
