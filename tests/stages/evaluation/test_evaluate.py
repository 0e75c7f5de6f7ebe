"""A test set is evaluated in batches of a bounded number of pixels."""

import pytest
import torch

from kdpipe.stages.data.image_set import ImageSet
from kdpipe.stages.data.loader.image_loader import ImageLoader
from kdpipe.stages.evaluation.evaluate import Evaluation
from kdpipe.stages.models.normalization import Normalization


@pytest.mark.parametrize(
    ("side", "sizes"), [(8, [500, 20]), (96, [500, 20]), (224, [91] * 5 + [65]), (4000, [1] * 520)]
)
def test_batches_of_large_images_are_smaller(side, sizes):
    images = torch.zeros((), dtype=torch.uint8).expand(520, 1, side, side)
    image_set = ImageSet("made", "test", images, torch.zeros(520, dtype=torch.int64), torch.arange(520), ("a",))
    loader = ImageLoader(image_set, torch.device("cpu"))
    asked = []
    object.__setattr__(loader, "stream", lambda requests: asked.extend(len(each.indices) for each in requests) or ())
    assert not list(Evaluation(loader, Normalization((0.0,), (1.0,))).batches())
    assert asked == sizes
