"""A few samples in a few views, with what the teacher said about each: so that people can look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.joining import join
from stages.pictures import Request, Seen
from stages.setup import Setup
from stages.targets import TargetLoadingConfig, Targets
from store import TargetStore, row_order

NUM_TOP = 3


@dataclass(frozen=True)
class ShownViews:
    """What `show_views` gives. `images` uint8 [S, V, C, H, W]; `sample_ids` and `labels` by sample; by sample and view
    `top`, the teacher's likeliest classes with their probabilities at T = 1, empty where no store says it, and
    `partners`, the label and the share of who is mixed in, if anybody is.
    """

    images: Tensor
    sample_ids: list[int]
    labels: list[str]
    top: list[list[list[tuple[str, float]]]]
    partners: list[list[tuple[str, float] | None]]


def show_views(setup: Setup, store: TargetStore | None, num_samples: int, num_views: int) -> ShownViews:
    """The first views of some samples, which the views' seed chooses."""
    train_set = setup.train_set
    known = torch.arange(train_set.num_samples)
    if store is not None:
        held = torch.from_numpy(store.samples.positions_of(train_set.sample_ids.numpy())) >= 0
        known = known[held]
    order = torch.from_numpy(row_order(train_set.sample_ids[known].numpy(), setup.views.seed))
    at = known[order[:num_samples]]
    views = range(min(num_views, setup.views.num_views if store is None else store.num_views))
    seen = [setup.pictures.one(Request(at, view)) for view in views]
    images = torch.stack([one.images.cpu() for one in seen], dim=1)
    names = train_set.class_names
    top = _top(setup, store, at, views) if store is not None else [[[] for _ in views] for _ in at]
    partners = [list(row) for row in zip(*[_partners(setup, one) for one in seen], strict=True)]
    labels = [names[label] for label in train_set.labels[at].tolist()]
    return ShownViews(images, train_set.sample_ids[at].tolist(), labels, top, partners)


def _partners(setup: Setup, seen: Seen) -> list[tuple[str, float] | None]:
    """The label and the share of who is mixed into each picture of a batch."""
    found: list[tuple[str, float] | None] = [None] * len(seen.positions)
    if seen.mixture is not None:
        rows = seen.mixture.mixed.nonzero()[:, 0]
        labels = setup.pictures.labels_of(seen.mixture.partners[rows]).tolist()
        for row, label, share in zip(rows.tolist(), labels, seen.mixture.own_share[rows].tolist(), strict=True):
            found[row] = (setup.train_set.class_names[label], 1 - share)
    return found


def _top(setup: Setup, store: TargetStore, at: Tensor, views: Sequence[int]) -> list[list[list[tuple[str, float]]]]:
    shown = setup.train_set.take(at)
    targets = Targets([join(store, shown, ())], torch.device("cpu"), TargetLoadingConfig(memory_bytes=0))
    found: list[list[list[tuple[str, float]]]] = [[] for _ in at]
    for view in views:
        said = targets.batch(view, torch.arange(len(at)))[0].logits_at(1.0).softmax(1)
        shares, classes = said.topk(min(NUM_TOP, said.shape[1]), dim=1)
        for row, (some, which) in enumerate(zip(shares.tolist(), classes.tolist(), strict=True)):
            named = [setup.train_set.class_names[number] for number in which]
            found[row].append(list(zip(named, some, strict=True)))
    return found
