"""Which layers of a student suffer from INT8: `kdpipe sensitivity`, on views that it is trained with."""

from __future__ import annotations

from itertools import islice

import torch

from stages.compress import CompressConfig, float_source
from stages.compression.sensitivity import LayerSensitivity, sensitivity
from stages.fine_tune import Tutor


def student_sensitivity(config: CompressConfig, tutor: Tutor, num_batches: int) -> list[LayerSensitivity]:
    """The layers of the float student, pruned where the recipe prunes, the worst first. Raises RunError where it is not
    there yet.
    """
    network, setup = float_source(config, tutor).load(), tutor.setup
    batches = tutor.lesson(network).stream(tutor.seed, config.quantize_train.batch_size, epoch=0, step=0, epochs=1)
    images = [batch.images.cpu() for batch in islice(batches, num_batches)]
    counter = setup.watch.counter("sensitivity", "one layer after the other", "layer")
    example = torch.zeros(2, *setup.image_shape)
    return sensitivity(network.model.cpu(), example, images, exclude=config.quantize.exclude, on_progress=counter)
