"""Build SimKD's student: its last map, a projector to the teacher's channels, and the teacher's classifier.

Chen et al. 2022 (arXiv 2203.14001). The module at the pair's student path becomes a sequence of itself, as `body`, and
the projector, as `projector`, so that a hook at that path gets the projected map; paths inside it, such as `layer3.0`,
become `layer3.body.0`.

Example:
    student = reuse_classifier(student, config, image_shape, linear_at(teacher, config.classifier[1]), seed=0)
    # in another process
    student = add_projector(build_same_student(), config, image_shape, num_features=256, num_classes=100, bias=True)
    student.load_state_dict(weights)  # strict
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError, RecipeError, cause
from kdpipe.stages.losses.features.simkd import SimKD
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.hooks import feature_shapes, get_module
from kdpipe.stages.models.safetensors_io import load_tensors
from kdpipe.stages.models.weights.state_dict import state_sha256
from kdpipe.store import FingerprintMismatch, differences

ImageShape = tuple[int, int, int]


def reuse_teacher_classifier(
    network: ModelBundle, config: SimKD, run: Path, image_shape: ImageShape, seed: int
) -> ModelBundle:
    """Add a projector and the teacher's classifier to `network`, in place, and to the record of its architecture.

    The teacher's weights are those that the recipe names, or else those in the folder `run`. Raises like
    `reuse_classifier`.
    """
    classifier = stored_linear(teacher_file(config, run), config.classifier[1])
    reuse_classifier(network.model, config, image_shape, classifier, seed=seed)
    record = {
        "layer": config.layers[0][0],
        "classifier": config.classifier[0],
        "factor": config.factor,
        "num_features": classifier.in_features,
    }
    return replace(network, architecture={**network.architecture, "reused_classifier": record})


def teacher_file(config: SimKD, run: Path) -> Path:
    """Return the file with the teacher's weights. Raises RecipeError if there is none."""
    path = Path(config.teacher) if config.teacher else run / "teacher" / "model.safetensors"
    if not path.exists():
        raise RecipeError(f"simkd needs the teacher's classifier, but {path} does not exist: set the loss's teacher.")
    return path


def require_teacher(config: SimKD, run: Path, teacher: Mapping[str, Any], store: Path) -> None:
    """Raise FingerprintMismatch unless the file's weights are those of the teacher that filled `store`."""
    actual = state_sha256(load_tensors(teacher_file(config, run))[0])
    if found := differences(teacher.get("weights_sha256"), actual, "weights_sha256"):
        advice = f"{store} is of another teacher: set simkd's teacher to the file of that one."
        raise FingerprintMismatch(f"the teacher in {teacher_file(config, run)}", found, advice)


def stored_linear(path: Path, layer: str) -> nn.Linear:
    """Load the linear layer at path `layer` from a weights file. Raises RecipeError if there is none."""
    tensors, _ = load_tensors(path)
    weight, bias = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.bias")
    if weight is None or weight.dim() != 2:
        linear = sorted(name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dim() == 2)
        raise RecipeError(
            f"simkd.classifier: the teacher in {path} has no linear layer {layer!r}; it has "
            f"{', '.join(linear) or 'none'}."
        )
    classifier = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    classifier.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return classifier


def linear_at(teacher: nn.Module, path: str) -> nn.Linear:
    """Return the teacher's classifier. Raises ModelError for an unknown path, RecipeError for other layers."""
    classifier = get_module(teacher, path)
    if isinstance(classifier, nn.Linear):
        return classifier
    raise RecipeError(
        f"simkd.classifier is the teacher's {path}, a {type(classifier).__name__}: only a linear layer after average "
        "pooling can be reused."
    )


def reuse_classifier(
    student: nn.Module, config: SimKD, image_shape: ImageShape, classifier: nn.Linear, *, seed: int
) -> nn.Module:
    """Add a projector, initialized from `seed`, and a frozen copy of the teacher's classifier to `student`, in place.

    Raises:
        ModelError: A module path does not exist.
        RecipeError: The student's layer does not output maps, or the student does not run with these parts; it is left
            unchanged.
    """
    add_projector(
        student,
        config,
        image_shape,
        num_features=classifier.in_features,
        num_classes=classifier.out_features,
        bias=classifier.bias is not None,
        seed=seed,
    )
    get_module(student, config.classifier[0]).load_state_dict(classifier.state_dict())
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
    layer, path = config.layers[0][0], config.classifier[0]
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
