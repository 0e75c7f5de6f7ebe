"""Measure INT8 sensitivity of a student's layers on training views (`kdpipe sensitivity`)."""

from __future__ import annotations

from itertools import islice

import torch

from stages.compress import CompressConfig, float_source
from stages.compression.sensitivity import LayerSensitivity, sensitivity
from stages.fine_tune import FineTuneContext


def student_sensitivity(config: CompressConfig, context: FineTuneContext, num_batches: int) -> list[LayerSensitivity]:
    """Return the layers of the float student (pruned if the recipe prunes), the worst first.

    Raises:
        RunError: If that student does not exist yet.
    """
    network, setup = float_source(config, context).load(), context.setup
    batches = context.task(network).stream(context.seed, config.quantize_train.batch_size, epoch=0, step=0, epochs=1)
    images = [batch.images.cpu() for batch in islice(batches, num_batches)]
    counter = setup.watch.counter("sensitivity", "layer by layer", "layer")
    example = torch.zeros(2, *setup.image_shape)
    return sensitivity(network.model.cpu(), example, images, exclude=config.quantize.exclude, on_progress=counter)
