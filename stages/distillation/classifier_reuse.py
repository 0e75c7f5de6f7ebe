"""Build SimKD's student: its last map, a projector to the teacher's channels, and the teacher's classifier.

Chen et al. 2022 (arXiv 2203.14001). The module at the pair's student path becomes a sequence of itself, as `body`, and
the projector, as `projector`, so that a hook at that path gets the projected map; paths inside it, such as `layer3.0`,
become `layer3.body.0`.

Example:
    student = reuse_classifier(student, config, image_shape, as_linear(store.head), seed=0)
    # in another process
    student = add_projector(build_same_student(), config, image_shape, num_features=256, num_classes=100, bias=True)
    student.load_state_dict(weights)  # strict
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError, RecipeError, cause
from kdpipe.stages.losses.base import Loss
from kdpipe.stages.losses.features.simkd import SimKD
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import feature_shapes, get_module
from kdpipe.stages.models.tokens import classifier_path

ImageShape = tuple[int, int, int]


def reuse_teacher_classifier(
    network: ModelBundle, config: SimKD, head: NDArray[np.float32], image_shape: ImageShape, seed: int
) -> ModelBundle:
    """Add a projector and the teacher's classifier to `network`, in place, and to the record of its architecture.

    `head` [C, D + 1] is the teacher's, as its store has it. Raises like `reuse_classifier`.
    """
    path, classifier = replaced_path(network.model, config), as_linear(head)
    reuse_classifier(network.model, config, image_shape, classifier, seed=seed)
    record = {
        "layer": config.layers[0][0],
        "classifier": path,
        "factor": config.factor,
        "num_features": classifier.in_features,
    }
    return replace(network, architecture={**network.architecture, "reused_classifier": record})


def reuse_own_classifier(
    network: ModelBundle, losses: Sequence[Loss], weights: Mapping[str, Tensor], image_shape: ImageShape
) -> ModelBundle:
    """Add what SimKD added to a student before it was trained, of which these are the weights, by name."""
    for loss in losses:
        if isinstance(loss, SimKD):
            path = replaced_path(network.model, loss)
            head = torch.cat([weights[f"{path}.weight"], weights[f"{path}.bias"][:, None]], 1).numpy()
            network = reuse_teacher_classifier(network, loss, head, image_shape, seed=0)
    return network


def replaced_path(student: nn.Module, config: SimKD) -> str:
    """Return the path of the student's classifier, by default its last layer."""
    return config.classifier or classifier_path(student)


def as_linear(head: NDArray[np.float32]) -> nn.Linear:
    """Return the layer of a head [C, D + 1]."""
    weights = torch.from_numpy(head)
    classifier = nn.Linear(head.shape[1] - 1, head.shape[0], device="meta")  # draws no random weights
    classifier.load_state_dict({"weight": weights[:, :-1].clone(), "bias": weights[:, -1].clone()}, assign=True)
    return classifier


def reuse_classifier(
    student: nn.Module, config: SimKD, image_shape: ImageShape, classifier: nn.Linear, *, seed: int
) -> nn.Module:
    """Add a projector, initialized from `seed`, and a frozen copy of the teacher's classifier to `student`, in place.

    Raises:
        ModelError: A module path does not exist.
        RecipeError: The student's layer does not output maps, or the student does not run with these parts; it is left
            unchanged.
    """
    path = replaced_path(student, config)
    add_projector(
        student,
        config,
        image_shape,
        num_features=classifier.in_features,
        num_classes=classifier.out_features,
        bias=classifier.bias is not None,
        seed=seed,
    )
    get_module(student, path).load_state_dict(classifier.state_dict())
    return student


def add_projector(
    student: nn.Module,
    config: SimKD,
    image_shape: ImageShape,
    *,
    num_features: int,
    num_classes: int,
    bias: bool = True,
    seed: int = 0,
) -> nn.Module:
    """Add the same modules without the teacher's weights, which are loaded next, to `student`, in place.

    `num_features`, `num_classes` and `bias` are those of the teacher's classifier. Raises like `reuse_classifier`.
    """
    layer, path = config.layers[0][0], replaced_path(student, config)
    body, original = get_module(student, layer), get_module(student, path)
    channels = _channels(student, layer, image_shape)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        tail = projector(channels, num_features, config.factor)
        classifier = nn.Linear(num_features, num_classes, bias).requires_grad_(False)
    like = next(student.parameters())
    parts = OrderedDict[str, nn.Module](body=body, projector=tail.to(like))
    _replace(student, path, classifier.to(like))
    _replace(student, layer, nn.Sequential(parts))
    try:
        require_logits(student, image_shape, num_classes)
    except Exception as error:  # networks raise anything on a shape mismatch
        _replace(student, layer, body)
        _replace(student, path, original)
        raise RecipeError(
            f"simkd: the student does not run with a projector of {num_features} channels after {layer} and the "
            f"teacher's classifier as {path} ({cause(error)}): choose the last map before pooling, and the classifier."
        ) from error
    return student


def projector_output_path(config: SimKD) -> str:
    """Return the path of the projector's last convolution, whose output goes to the teacher's classifier."""
    return f"{config.layers[0][0]}.projector.6"


def projector(channels: int, num_features: int, factor: int) -> nn.Sequential:
    """Build a projector [B, channels, H, W] to [B, num_features, H, W].

    1x1, 3x3 and 1x1 convolutions, each with batch norm and ReLU; inside it is `factor` times narrower than the result.
    """
    middle = max(1, num_features // factor)
    widths = (channels, middle, middle, num_features)
    layers: list[nn.Module] = []
    for kernel, width, out in zip((1, 3, 1), widths[:-1], widths[1:], strict=True):
        layers += [nn.Conv2d(width, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers)


def _channels(student: nn.Module, layer: str, image_shape: ImageShape) -> int:
    shape = feature_shapes(student, [layer], image_shape)[layer]
    if len(shape) == 3:
        return int(shape[0])
    raise RecipeError(
        f"simkd: the student's {layer} outputs {list(shape)} per sample, expected a map [C, H, W]: choose the last map "
        "before pooling."
    )


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def require_logits(student: nn.Module, image_shape: ImageShape, num_classes: int) -> None:
    """Run two black images. Raises ModelError if the result is not logits, and whatever the network raises."""
    was_training = student.training
    student.eval()
    try:
        with torch.no_grad():
            logits: Tensor = student(torch.zeros(2, *image_shape).to(next(student.parameters())))
    finally:
        student.train(was_training)
    if list(logits.shape) != [2, num_classes]:
        raise ModelError(f"it outputs {list(logits.shape)} for two images, expected logits [2, {num_classes}]")
