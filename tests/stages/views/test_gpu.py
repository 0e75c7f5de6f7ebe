"""On CUDA: the same parameters, pixels within a gray level of the CPU's, no waits. Runs with --device cuda."""

import pytest
import torch
from support.device import DEVICE, needs_gpu, without_waits

from kdpipe.stages.views.mix import MixConfig, mix, sample_mix
from kdpipe.stages.views.rng import CounterRNG
from kdpipe.stages.views.tensor_engine import parse_operations

pytestmark = needs_gpu

OPERATIONS = (
    {"name": "RandomCrop", "padding": 2},
    {"name": "RandomHorizontalFlip"},
    {"name": "RandomVerticalFlip"},
    {"name": "RandomResizedCrop"},
    {"name": "RandomAffine", "degrees": 30.0, "translate": [0.2, 0.2], "scale": [0.8, 1.2], "shear": 10.0},
    {"name": "ColorJitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2},
    {"name": "RandomGrayscale", "p": 0.5},
    {"name": "RandomErasing", "p": 1.0, "value": "random"},
    {"name": "RandomErasing", "p": 1.0, "value": 128},
    {"name": "Cutout", "size": 5},
    {"name": "RandAugment"},
    {"name": "TrivialAugmentWide"},
)


def differ_by(one, other):
    return int((one.int() - other.cpu().int()).abs().max())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation["name"])
def test_an_operation_gives_the_same_pixels_within_a_grey_level(operation, channels):
    images = torch.randint(256, (64, channels, 33, 29), dtype=torch.uint8)
    engine, draw = parse_operations([operation]), CounterRNG(1, 2, torch.arange(64))
    here = images.to(DEVICE)
    with without_waits():
        rendered = engine(here, draw)
    assert differ_by(engine(images, draw), rendered) <= 1


@pytest.mark.parametrize("config", [MixConfig(mixup_alpha=0.4), MixConfig(cutmix_alpha=1.0)])
def test_mixtures_are_the_same(config):
    images, partners = torch.randint(256, (2, 64, 3, 33, 29), dtype=torch.uint8).unbind()
    mixture = sample_mix(config, CounterRNG(1, 2, torch.arange(64)), torch.arange(64), (33, 29))
    assert differ_by(mix(images, partners, mixture), mix(images.to(DEVICE), partners.to(DEVICE), mixture)) == 0
