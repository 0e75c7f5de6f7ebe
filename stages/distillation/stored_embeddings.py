"""The embeddings in a store, with their labels."""

from __future__ import annotations

import numpy as np
import torch

from kdpipe.stages.evaluation.embeddings import MAX_LABELED, Embeddings
from kdpipe.store import StoreError, TargetStore
from kdpipe.store.format.manifest import EMBEDDINGS


def embeddings_in(store: TargetStore) -> Embeddings:
    """Return the embeddings of labeled samples in the first view of a store, at most MAX_LABELED of them.

    Rows are in a pseudo-random order: the first ones are a sample.

    Raises:
        StoreError: It has no embeddings, or no label.
    """
    if EMBEDDINGS not in {spec.name for spec in store.arrays}:
        raise StoreError(
            f"{store.path} has no embeddings ({EMBEDDINGS}): cache a teacher without a classifier (teacher.output = "
            "'embeddings'), or add them with cache.layers = ['pre_logits']."
        )
    labeled = np.flatnonzero(store.samples.labels >= 0)[:MAX_LABELED]
    if not len(labeled):
        raise StoreError(f"{store.path} has no label: embeddings are judged by how well classes can be told apart.")
    vectors = store.gather(EMBEDDINGS, 0, store.samples.ids[labeled])
    return Embeddings(torch.from_numpy(vectors).float(), torch.from_numpy(store.samples.labels[labeled]))
