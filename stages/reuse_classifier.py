"""SimKD's student: after its last map a projector to the teacher's channels, and then the teacher's own classifier.

Chen et al. 2022 (arXiv 2203.14001). The module at the pair's student path becomes a sequence of itself, as `body`, and
the projector, as `projector`, so that whoever hooks that path gets the projected map; paths inside it, such as
`layer3.0`, are `layer3.body.0` from then on.

student = reuse_classifier(student, config, image_shape, linear_of(teacher, config.classifier[1]), seed=0)
# in another process, years later
student = with_projector(build_the_same_student(), config, image_shape, num_features=256, num_classes=100, bias=True)
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

from stages.errors import ModelError, RecipeError, cause
from stages.features import feature_shapes
from stages.losses.simkd import SimKDConfig
from stages.models.module_path import module_named
from stages.models.weights import state_sha256
from stages.network import Network
from stages.tensor_file import load_tensors
from store import FingerprintMismatch, differences

ImageShape = tuple[int, int, int]


def with_teachers_classifier(
    network: Network, config: SimKDConfig, run: Path, image_shape: ImageShape, seed: int
) -> Network:
    """`network`, in place, with a projector and the classifier of the teacher whose weights the recipe names, or whose
    they are in the folder `run`; the record of its architecture says so. Raises what `reuse_classifier` raises.
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


def teacher_file(config: SimKDConfig, run: Path) -> Path:
    """Where the weights of the teacher are whose classifier is reused. Raises RecipeError where there is no file."""
    path = Path(config.teacher) if config.teacher else run / "teacher" / "model.safetensors"
    if not path.exists():
        raise RecipeError(
            f"simkd reuses the teacher's classifier, and there is no file {path}: name it as its teacher."
        )
    return path


def require_teacher(config: SimKDConfig, run: Path, teacher: Mapping[str, Any], store: Path) -> None:
    """Raise FingerprintMismatch unless the file's weights are those of the teacher that filled `store`."""
    held = state_sha256(load_tensors(teacher_file(config, run))[0])
    if found := differences(teacher.get("weights_sha256"), held, "weights_sha256"):
        advice = f"{store} was filled by another teacher: name that one's file as simkd's teacher."
        raise FingerprintMismatch(f"the teacher in {teacher_file(config, run)}", found, advice)


def stored_linear(path: Path, layer: str) -> nn.Linear:
    """The linear layer called `layer` in a file of weights. Raises RecipeError where there is none."""
    tensors, _ = load_tensors(path)
    weight, bias = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.bias")
    if weight is None or weight.dim() != 2:
        linear = sorted(name.removesuffix(".weight") for name, one in tensors.items() if one.dim() == 2)
        raise RecipeError(
            f"simkd.classifier: the teacher in {path} has no linear layer {layer!r}; it has "
            f"{', '.join(linear) or 'none'}."
        )
    classifier = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    classifier.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return classifier


def linear_of(teacher: nn.Module, path: str) -> nn.Linear:
    """The teacher's classifier. Raises ModelError for an unknown path, RecipeError where no linear layer is there."""
    classifier = module_named(teacher, path)
    if isinstance(classifier, nn.Linear):
        return classifier
    raise RecipeError(
        f"simkd.classifier names the teacher's {path}, a {type(classifier).__name__}: only a linear layer, "
        "that sees the last map averaged, can be reused."
    )


def reuse_classifier(
    student: nn.Module, config: SimKDConfig, image_shape: ImageShape, classifier: nn.Linear, *, seed: int
) -> nn.Module:
    """Give `student`, in place, a projector, initialised from `seed`, and the teacher's classifier, copied and frozen.

    image_shape: (C, H, W). Raises ModelError for an unknown path, and RecipeError where the student's layer gives no
    maps, or the student does not run with these parts; it is then as it was.
    """
    with_projector(
        student,
        config,
        image_shape,
        num_features=classifier.in_features,
        num_classes=classifier.out_features,
        bias=classifier.bias is not None,
        seed=seed,
    )
    module_named(student, config.classifier[0]).load_state_dict(classifier.state_dict())
    return student


def with_projector(
    student: nn.Module,
    config: SimKDConfig,
    image_shape: ImageShape,
    *,
    num_features: int,
    num_classes: int,
    bias: bool = True,
    seed: int = 0,
) -> nn.Module:
    """The same modules without the teacher's weights, for weights that are loaded next; `student` is changed in place.

    num_features, num_classes, bias: of the teacher's classifier. Raises like `reuse_classifier`.
    """
    layer, path = config.layers[0][0], config.classifier[0]
    body, old = module_named(student, layer), module_named(student, path)
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
        _require_logits(student, image_shape, num_classes)
    except Exception as error:  # networks fail on a misfit in any way they like
        _replace(student, layer, body)
        _replace(student, path, old)
        raise RecipeError(
            f"simkd: the student does not run with a projector of {num_features} channels after {layer} and the "
            f"teacher's classifier as {path} ({cause(error)}): name the last map before the pool, and the classifier."
        ) from error
    return student


def last_of_projector(config: SimKDConfig) -> str:
    """The path of the projector's last convolution, whose channels the teacher's classifier sees."""
    return f"{config.layers[0][0]}.projector.6"


def projector(channels: int, num_features: int, factor: int) -> nn.Sequential:
    """[B, channels, H, W] to [B, num_features, H, W]: 1x1, 3x3 and 1x1 convolutions, each with BN and ReLU, the middle
    one `factor` times narrower than the result.
    """
    middle = max(1, num_features // factor)
    widths = (channels, middle, middle, num_features)
    layers: list[nn.Module] = []
    for kernel, width, wider in zip((1, 3, 1), widths[:-1], widths[1:], strict=True):
        layers += [nn.Conv2d(width, wider, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
    return nn.Sequential(*layers)


def _channels(student: nn.Module, layer: str, image_shape: ImageShape) -> int:
    shape = feature_shapes(student, [layer], image_shape)[layer]
    if len(shape) == 3:
        return int(shape[0])
    raise RecipeError(
        f"simkd: the student's {layer} gives {list(shape)} a sample, wanted a map [C, H, W]: name the last map before "
        "the pool."
    )


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _require_logits(student: nn.Module, image_shape: ImageShape, num_classes: int) -> None:
    """Run two black images. Raises ModelError where the result is not logits; and what the network itself raises."""
    was_training = student.training
    student.eval()
    try:
        with torch.no_grad():
            logits: Tensor = student(torch.zeros(2, *image_shape).to(next(student.parameters())))
    finally:
        student.train(was_training)
    if list(logits.shape) != [2, num_classes]:
        raise ModelError(f"it makes {list(logits.shape)} of two images, wanted logits [2, {num_classes}]")
