"""An example of a plug-in: importing this module registers what it has."""

from __future__ import annotations

import json

import numpy as np
from torch import Tensor, nn

import kdpipe as kd


@kd.register_loss
def logit_mae(student_logits: Tensor, teacher_logits: Tensor, *, margin: float = 0.0) -> Tensor:
    """Mean absolute error between the logits of student and teacher, beyond a margin."""
    return ((student_logits - teacher_logits).abs() - margin).relu().mean(1)  # [B]


@kd.register_model
def two_layers(num_classes: int, in_channels: int, image_size: tuple[int, int], *, width: int = 16) -> nn.Module:
    """Build a perceptron with one hidden layer."""
    num_inputs = in_channels * image_size[0] * image_size[1]
    return nn.Sequential(nn.Flatten(), nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, num_classes))


@kd.register_dataset
def bars(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return 8x8 images of a horizontal (0) or vertical (1) bar in noise."""
    generator = np.random.default_rng(0 if split == "train" else 1)
    labels = np.arange(200) % 2
    images = generator.integers(0, 128, (200, 8, 8), dtype=np.uint8)
    for image, label, position in zip(images, labels, generator.integers(0, 8, 200), strict=True):
        (image.T if label else image)[position] = 255
    return images, labels


@kd.register_callback
class BestEpochs(kd.Callback):
    """Write the epochs in which the test accuracy rose to best_epochs.json in the job's folder."""

    def on_run_end(self, state: kd.CallbackState) -> None:
        best, epochs = -1.0, []
        for line in state.history:
            if line["accuracy"] > best:
                best = line["accuracy"]
                epochs.append(line["epoch"])
        (state.folder / "best_epochs.json").write_text(json.dumps(epochs))
