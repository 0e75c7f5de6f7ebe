"""torchvision's image classifiers by name, with fresh or published weights.

torchvision takes longer to import than torch itself, so it is imported only when needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.models.arguments import refuse_unknown_args
from kdpipe.stages.models.weights.match import replace_head
from kdpipe.stages.models.weights.state_dict import load_entries

CHANNELS = 3
# Arguments that a family's builders take out of their **kwargs.
BUILDER_ARGS = {
    "efficientnet_": {"dropout"},
    "vit_": {"image_size"},
    "maxvit_": {"input_size"},
    "mobilenet_v3_": {"width_mult", "reduced_tail", "dilated"},
}
WITH_AUXILIARY_HEADS = frozenset({"googlenet", "inception_v3"})
"""They return more than logits in training, and their published weights are of another input scaling."""


@cache
def classifier_names() -> tuple[str, ...]:
    """Return the names of torchvision's image classifiers, sorted."""
    from torchvision import models

    # Detection, segmentation, video and quantized networks live in sub-packages of their own.
    return tuple(models.list_models(module=models))


def build_classifier(
    name: str,
    args: Mapping[str, Any],
    *,
    num_classes: int,
    in_channels: int,
    published: bool,
    fresh_head: bool = False,
    notify: Callable[[str], None] = lambda notice: None,
) -> nn.Module:
    """Build torchvision's classifier `name`: images [B, 3, H, W] -> logits [B, num_classes].

    With `published` it has torchvision's default weights, and a new head where their number of classes differs, which
    `notify` receives a sentence, or with `fresh_head`. Raises
    ModelError for another number of channels, unknown arguments, or weights that cannot be downloaded.
    """
    if in_channels != CHANNELS:
        raise ModelError(
            f"{name} takes {CHANNELS} channels, the data has {in_channels}: set data.channels = {CHANNELS}."
        )
    if not published:
        return _construct(name, args, num_classes)
    if name in WITH_AUXILIARY_HEADS and args.get("transform_input") is not True:
        raise ModelError(f"the published weights of {name} need args.transform_input = true, which scales its input.")
    from torchvision import models

    weights = models.get_model_weights(name).DEFAULT
    published_classes = len(published_categories(name))
    model = _construct(name, args, published_classes)
    load_entries(model, {"": _download(name, weights)}, f"the published weights of {name}")
    if num_classes != published_classes or fresh_head:
        notify(
            f"the published weights of {name} are of {published_classes:,} classes, the data has {num_classes:,}: the "
            "classifier is new, drawn from the seed."
        )
        replace_head(model, published_classes, num_classes)
    return model


def published_categories(name: str) -> tuple[str, ...]:
    """Return the names of the classes of the published weights of torchvision's classifier `name`, in order."""
    from torchvision import models

    return tuple(models.get_model_weights(name.rpartition(":")[2]).DEFAULT.meta["categories"])


def refusal(name: str) -> ModelError | None:
    """Return the error for another network of torchvision, which is not supported; None for other names."""
    from torchvision import models

    if name in models.list_models():
        return ModelError(f"{name} is a network of torchvision, but not a plain image classifier: choose one that is.")
    return None


def _construct(name: str, args: Mapping[str, Any], num_classes: int) -> nn.Module:
    from torchvision import models

    builder = models.get_model_builder(name)
    made = {"weights": None, "progress": False, "num_classes": num_classes}
    refuse_unknown_args(name, args, _accepted_args(name, builder) - set(made), made)
    defaults = {"init_weights": True} if name in WITH_AUXILIARY_HEADS else {}  # torchvision warns that it will change
    try:
        model: nn.Module = builder(**made, **{**defaults, **args})
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ModelError(f"{name} cannot be built with args {dict(args)!r} ({cause(error)}).") from error
    return model


def _accepted_args(name: str, builder: Callable[..., nn.Module]) -> set[str]:
    """Return the arguments that the builder passes to its class: those with a default; it sets the others itself."""
    network = inspect.signature(builder, eval_str=True).return_annotation
    parameters = inspect.signature(network).parameters.values()
    by_class = {each.name for each in parameters if each.default is not inspect.Parameter.empty}
    return by_class.union(*(own for family, own in BUILDER_ARGS.items() if name.startswith(family)))


def _download(name: str, weights: Any) -> Mapping[str, Tensor]:
    options = {"progress": False, "check_hash": True, "weights_only": True, "map_location": "cpu"}
    try:
        return weights.get_state_dict(**options)  # type: ignore[no-any-return]
    except Exception as error:  # a download fails in many ways: no network, no disk, a broken cache
        raise ModelError(
            f"the published weights of {name} cannot be loaded from {weights.url} ({cause(error)}): download them "
            "elsewhere and put them into $TORCH_HOME/hub/checkpoints."
        ) from error


Resizing = tuple[tuple[int, int] | None, float | None, str | None]
"""Height and width of images, the share of the shorter side that is cropped, and the interpolation; None if unknown."""


def published_resizing(name: str) -> Resizing:
    """Return how the images for a network's published weights are resized and cropped."""
    from torchvision import models

    if name.rpartition(":")[2] not in models.list_models():
        return None, None, None
    made = models.get_model_weights(name.rpartition(":")[2]).DEFAULT.transforms()
    side, resized = made.crop_size[0], made.resize_size[0]
    return (side, side), side / resized, made.interpolation.value
