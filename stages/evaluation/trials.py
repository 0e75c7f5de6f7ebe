"""Try what usually goes wrong with a network trained elsewhere: its input scaling, the order of its classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from kdpipe.stages.data.image_set import UNLABELED
from kdpipe.stages.data.loader.image_loader import ViewRequest
from kdpipe.stages.errors import first_few
from kdpipe.stages.evaluation.evaluate import Evaluation, in_batches
from kdpipe.stages.models.normalization import Normalization
from kdpipe.stages.runtime.memory import run_in_chunks

FIRST_IMAGES = 64
"""Images on which each scaling is tried; those that gain there are tried on MORE_IMAGES."""

MORE_IMAGES = 320

ORDER_IMAGES = 1000
"""Images from which an order of the classes is found, with one half, and confirmed, with the other."""

MAX_ORDERED = 1000
"""Classes beyond which no order is searched: it takes a matrix of all pairs."""

MIN_ORDERED = {20: 0.5, MAX_ORDERED: 0.25}
"""Accuracies in another order that are reported, by the largest number of classes.

Some order fits a random network better than its own: that is no finding.
"""

MIN_GAIN = 0.05
"""The smallest gain of accuracy that is reported."""

MIN_SIGMAS = 4.0
"""Standard errors that a gain must exceed: many scalings are tried."""

SCALINGS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "pixels from -1 to 1": ((0.5,), (0.5,)),
    "pixels from 0 to 1": ((0.0,), (1.0,)),
    "pixels from 0 to 255": ((0.0,), (1 / 255,)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-100's": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "MNIST's": ((0.1307,), (0.3081,)),
    "Caffe's, pixels from 0 to 255 less their mean": ((0.485, 0.456, 0.406), (1 / 255,)),
}
"""Usual input scalings; one number is for all channels."""


@dataclass(frozen=True)
class Finding:
    """A change with which a network is right on clearly more test images, and what to do.

    Attributes:
        change: What was changed.
        accuracy: The accuracy with the change.
        before: The accuracy without it, on the same images.
        num_samples: The images.
        advice: The next step.
    """

    change: str
    accuracy: float
    before: float
    num_samples: int
    advice: str

    def __str__(self) -> str:
        return (
            f"With {self.change}, it reaches {100 * self.accuracy:.1f} % of a sample of {self.num_samples}, against "
            f"{100 * self.before:.1f} %: {self.advice}."
        )


def try_scalings(model: nn.Module, test: Evaluation) -> Finding | None:
    """Return the usual input scaling with which a network is right on clearly more test images, if there is one.

    Images of three channels are also tried in the order blue, green, red.
    """
    channels = test.loader.dataset.in_channels
    few, more = (_sample(test, count) for count in (FIRST_IMAGES, MORE_IMAGES))
    tried = [(name, scaling, flip) for name, scaling in _scalings(channels) for flip in (False, True)]
    before = int(_is_right(model, test, few, test.normalize).sum())
    promising = [
        one
        for one in tried
        if (one[1] != test.normalize or one[2])
        and (channels == len("RGB") or not one[2])
        and int(_is_right(model, test, few, one[1], flip=one[2]).sum()) > before
    ]
    if not promising:
        return None
    plain = _is_right(model, test, more, test.normalize)
    right = [_is_right(model, test, more, scaling, flip=flip) for _, scaling, flip in promising]
    best = max(range(len(right)), key=lambda number: int(right[number].sum()))
    name, scaling, flip = promising[best]
    advice = f"set teacher.mean = {list(scaling.mean)} and teacher.std = {list(scaling.std)}"
    if flip:
        name, advice = f"{name}, channels blue, green, red", f"{advice}, and reverse the channels in a python: factory"
    return _finding(f"{scaling} ({name})", advice, right[best], plain)


def try_class_order(model: nn.Module, test: Evaluation) -> Finding | None:
    """Return the order of the classes with which a network is right on clearly more test images, if there is one.

    It is found on one half of a sample, and its gain is measured on the other.
    """
    from scipy.optimize import linear_sum_assignment

    names = test.class_names
    if len(names) > MAX_ORDERED:
        return None
    labels, predicted = _predictions(model, test, _sample(test, ORDER_IMAGES), test.normalize)
    counts = torch.zeros(len(names), len(names))
    counts.index_put_((predicted[::2], labels[::2]), torch.ones(()), accumulate=True)
    counts += 1e-3 * torch.eye(len(names))  # classes without samples stay where they are
    order = torch.from_numpy(linear_sum_assignment(counts.numpy(), maximize=True)[1])
    moved = [f"output {one} is {names[order[one]]!r}" for one in range(len(names)) if order[one] != one]
    if not moved:
        return None
    advice = "name its classes in their order (teacher.model.classes)"
    labels, predicted = labels[1::2], predicted[1::2]
    finding = _finding(
        f"its classes in another order ({first_few(moved, 3)})", advice, order[predicted] == labels, predicted == labels
    )
    lowest = next(accuracy for num_classes, accuracy in MIN_ORDERED.items() if len(names) <= num_classes)
    return finding if finding and finding.accuracy >= lowest else None


def _scalings(channels: int) -> list[tuple[str, Normalization]]:
    widths = {1, channels}
    return [
        (name, Normalization(*(values if len(values) == channels else values * channels for values in scaling)))
        for name, scaling in SCALINGS.items()
        if {len(values) for values in scaling} <= widths
    ]


def _sample(test: Evaluation, count: int) -> Tensor:
    """Return the positions of `count` labeled test images, spread evenly: they may be sorted by class."""
    labeled = (test.loader.dataset.labels != UNLABELED).nonzero()[:, 0]
    return labeled[torch.linspace(0, len(labeled) - 1, min(count, len(labeled))).round().long()]


def _finding(change: str, advice: str, right: Tensor, before: Tensor) -> Finding | None:
    """Return the finding if it is right on clearly more of the same images: a sign test, and MIN_GAIN."""
    won, lost = int((right & ~before).sum()), int((before & ~right).sum())
    if won - lost < max(MIN_SIGMAS * (won + lost) ** 0.5, MIN_GAIN * len(right), 1):
        return None
    return Finding(change, float(right.double().mean()), float(before.double().mean()), len(right), advice)


def _is_right(
    model: nn.Module, test: Evaluation, indices: Tensor, scaling: Normalization, *, flip: bool = False
) -> Tensor:
    labels, predicted = _predictions(model, test, indices, scaling, flip=flip)
    return labels == predicted


@torch.no_grad()
def _predictions(
    model: nn.Module, test: Evaluation, indices: Tensor, scaling: Normalization, *, flip: bool = False
) -> tuple[Tensor, Tensor]:
    """Return labels and predictions, int64 [n], of the test images at `indices`. The model is in eval mode."""
    labels: list[Tensor] = []
    predicted: list[Tensor] = []
    for image_batch in test.loader.stream(ViewRequest(some) for some in in_batches(indices, test.loader)):
        test.before_batch()
        classes = partial(_classes, model, image_batch.images, scaling, flip)
        predicted += run_in_chunks(model, len(image_batch.images), classes, test.warn)
        labels.append(test.loader.dataset.labels[image_batch.indices].cpu())
    return torch.cat(labels), torch.cat(predicted)


def _classes(model: nn.Module, images: Tensor, scaling: Normalization, flip: bool, rows: slice) -> Tensor:
    scaled = scaling(images[rows])
    predicted: Tensor = model(scaled.flip(1) if flip else scaled).argmax(1).cpu()
    return predicted
