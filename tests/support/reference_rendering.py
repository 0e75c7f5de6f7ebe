"""Reference renderings: each image by itself from raw pixels, to compare loaders with; and tasks that load them."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from kdpipe.stages.data.loader.image_loader import ImageLoader
from kdpipe.stages.models.hooks import ModelOutput
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.training.task import TrainingTask
from kdpipe.stages.views.config import Views
from kdpipe.stages.views.mix import MixConfig, mix
from kdpipe.stages.views.renderer import Renderer
from support.device import DEVICE

NUM_SAMPLES = 26
MIX = MixConfig(mixup_alpha=0.6, cutmix_alpha=1.0, p=0.7)
CROPS = Views(seed=5, operations=({"name": "RandomCrop", "padding": 2}, {"name": "RandomHorizontalFlip"}))
ANY = Views(
    seed=5,
    engine="transforms",
    operations=(
        {"name": "RandomResizedCrop", "size": [8, 6]},
        {"name": "RandomHorizontalFlip"},
        {"name": "ColorJitter", "brightness": 0.4, "hue": 0.1},
    ),
)
MIXED_CROPS, MIXED_ANY = dataclasses.replace(CROPS, mix=MIX), dataclasses.replace(ANY, mix=MIX)
VIEWS = {"crops": CROPS, "mixed crops": MIXED_CROPS, "any": ANY, "mixed any": MIXED_ANY}
SCALING = Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@cache
def make_renderer(views_name, size, partner_pool):
    return Renderer(VIEWS[views_name], 3, size, torch.tensor(partner_pool))


def renderer_of(image_set, views, partners=None):
    """Return a cached renderer: building one checks its pipeline, which takes time."""
    partner_pool = torch.sort((partners or image_set).sample_ids).values.tolist()
    name = next(name for name, config in VIEWS.items() if config is views)
    return make_renderer(name, image_set.image_size, tuple(partner_pool))


def loader_of(image_set, views, num_workers, **changes):
    renderer = renderer_of(image_set, views, changes.get("mix_partners"))
    return ImageLoader(image_set, DEVICE, renderer, num_workers=num_workers, **changes)


def mixture_of(image_set, views, positions, view, partners=None):
    return renderer_of(image_set, views, partners).sample_mix(image_set.sample_ids[positions], view)


def render_alone(image_set, views, at, view, partners=None):
    """Render one sample by itself from raw images, mixed with its partner in the same view."""
    renderer, others = renderer_of(image_set, views, partners), partners or image_set

    def view_of(source, position):
        sample_id = source.sample_ids[position : position + 1]
        return renderer.render_batch(
            renderer.render_image(source.read(position), int(sample_id), view)[None], sample_id, view
        )

    image = view_of(image_set, at)
    mixture = renderer.sample_mix(image_set.sample_ids[at : at + 1], view)
    if mixture is None or not mixture.mixed.any():
        return image[0]
    partner = others.sample_ids.tolist().index(int(mixture.partner_ids[0]))
    return mix(image, view_of(others, partner), mixture)[0]


def expected(image_set, views, positions, view, partners=None):
    """Images rendered one by one, uint8 [B, C, H, W] on the device."""
    return torch.stack([render_alone(image_set, views, at, view, partners) for at in positions.tolist()]).to(DEVICE)


def shuffled(seed, num_samples=NUM_SAMPLES):
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))


def make_task(loader, **changes):
    return TrainingTask(loader, num_views=2, normalize=SCALING, **changes)


def check_labels(image_set, positions, view, batch):
    """Check a batch's own and partner labels, shares and loss against a direct computation."""
    mixture = mixture_of(image_set, MIXED_CROPS, positions, view)
    label_of = dict(zip(image_set.sample_ids.tolist(), image_set.labels.tolist(), strict=True))
    assert torch.equal(batch.hard.labels.cpu(), image_set.labels[positions])
    assert batch.hard.partner_labels.tolist() == [label_of[sample_id] for sample_id in mixture.partner_ids.tolist()]
    assert torch.equal(batch.hard.own_share.cpu(), mixture.own_share)
    assert 0 < mixture.mixed.sum() < len(positions), "some are mixed and some are not"
    logits = torch.randn(len(positions), 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    log_p, rows = F.log_softmax(logits.double(), 1), torch.arange(len(positions))
    own, partners = -log_p[rows, batch.hard.labels], -log_p[rows, batch.hard.partner_labels]
    share = mixture.own_share.double().to(DEVICE)
    by_hand = (share * own + (1 - share) * partners).mean()
    losses = make_task(loader_of(image_set, MIXED_CROPS, 0), hard_label_weight=0.5).losses(
        ModelOutput(logits, {}), batch
    )
    assert list(losses) == ["hard_labels"]
    assert float(losses["hard_labels"]) == pytest.approx(0.5 * float(by_hand), rel=1e-5)
