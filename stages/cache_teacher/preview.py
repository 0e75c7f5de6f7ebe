"""Preview views of some samples, with the teacher's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdpipe.stages.context import StageContext
from kdpipe.stages.data.loader.image_loader import ImageBatch, ViewRequest
from kdpipe.stages.data.tasks import CLASSIFICATION
from kdpipe.stages.targets.join import join
from kdpipe.stages.targets.reader import TargetLoadingConfig, Targets
from kdpipe.store import TargetStore, row_order

NUM_TOP = 3


@dataclass(frozen=True)
class ViewPreview:
    """S samples in V views.

    Attributes:
        images: uint8 [S, V, C, H, W].
        views: What each view is called, [V].
        sample_ids: [S].
        labels: [S].
        top: By sample and view, the teacher's top classes and their probabilities at T = 1; empty without a store, or
            if it has embeddings.
        partners: By sample and view, label and share of the mix partner, if any.
    """

    images: Tensor
    views: list[str]
    sample_ids: list[int]
    labels: list[str]
    top: list[list[list[tuple[str, float]]]]
    partners: list[list[tuple[str, float] | None]]


def show_views(context: StageContext, store: TargetStore | None, num_samples: int, num_views: int) -> ViewPreview:
    """Render the first views of some samples, chosen by the views' seed; `store` may add the teacher's predictions."""
    train_set = context.train_set
    known = torch.arange(train_set.num_samples)
    if store is not None:
        stored = torch.from_numpy(store.samples.positions_of(train_set.sample_ids.numpy())) >= 0
        known = known[stored]
    order = torch.from_numpy(row_order(train_set.sample_ids[known].numpy(), context.views.seed))
    indices = known[order[:num_samples]]
    views = range(min(num_views, context.views.num_stored if store is None else store.num_views))
    batches = [context.train_loader.get(ViewRequest(indices, view)) for view in views]
    images = torch.stack([batch.images.cpu() for batch in batches], dim=1)
    has_logits = store is not None and store.manifest.has_logits and train_set.task == CLASSIFICATION
    top = _top(context, store, indices, views) if store and has_logits else [[[] for _ in views] for _ in indices]
    partners = [list(row) for row in zip(*[_partners(context, batch) for batch in batches], strict=True)]
    labels = [train_set.label_name(index) for index in indices.tolist()]
    named = [context.views.name_of(view) for view in views]
    return ViewPreview(images, named, train_set.sample_ids[indices].tolist(), labels, top, partners)


def _partners(context: StageContext, batch: ImageBatch) -> list[tuple[str, float] | None]:
    """Return label and share of the partner mixed into each image of a batch."""
    found: list[tuple[str, float] | None] = [None] * len(batch.indices)
    pool = context.train_loader.mix_partners or context.train_set
    if batch.mixture is not None:
        rows = batch.mixture.mixed.nonzero()[:, 0]
        ids = pool.sample_ids.tolist()
        partners = batch.mixture.partner_ids[rows].tolist()
        for row, partner, share in zip(rows.tolist(), partners, batch.mixture.own_share[rows].tolist(), strict=True):
            found[row] = (pool.label_name(ids.index(partner)), 1 - share)
    return found


def _top(
    context: StageContext, store: TargetStore, indices: Tensor, views: Sequence[int]
) -> list[list[list[tuple[str, float]]]]:
    shown = context.train_set.take(indices)
    targets = Targets([join(store, shown, ())], torch.device("cpu"), TargetLoadingConfig(memory_bytes=0))
    found: list[list[list[tuple[str, float]]]] = [[] for _ in indices]
    for view in views:
        probabilities = targets.batch(view, torch.arange(len(indices)))[0].logits_at(1.0).softmax(1)
        top, classes = probabilities.topk(min(NUM_TOP, probabilities.shape[1]), dim=1)
        for row, (values, numbers) in enumerate(zip(top.tolist(), classes.tolist(), strict=True)):
            named = [context.train_set.class_names[number] for number in numbers]
            found[row].append(list(zip(named, values, strict=True)))
    return found
