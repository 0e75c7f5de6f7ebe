"""timm's classifiers by name: `timm:NAME`, with or without a tag of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from kdpipe.stages.errors import ModelError, UnknownModelError, cause
from kdpipe.stages.models.arguments import refuse_unknown_args
from kdpipe.stages.runtime.hub import hub_cause, hub_or_cache
from kdpipe.store.errors import did_you_mean

PREFIX = "timm:"

SET_HERE = ("num_classes", "in_chans", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path")
"""Arguments of timm.create_model that follow from the data and from `model.weights`."""


def build_timm(
    name: str,
    args: Mapping[str, Any],
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    published: bool,
    fresh_head: bool = False,
    notify: Callable[[str], None] = lambda notice: None,
) -> nn.Module:
    """Build the classifier `timm:NAME`: images [B, in_channels, *image_size] -> logits [B, num_classes].

    With `num_classes` 0 it returns its pooled features.

    A network of a fixed input size, such as a ViT, is built for the images' size, unless `args` have one. Published
    weights come from the Hugging Face hub or its cache, with a new classifier where they are of other classes, of which
    `notify` receives a sentence.

    Raises:
        ModelError: There is no such network, argument or weights file, or no timm.
    """
    refuse_unknown_args(name, args, None, SET_HERE)
    config = timm_config(name)
    sized = {"img_size": image_size} if _is_resized(config, args, image_size) else {}
    made = {"num_classes": num_classes, "in_chans": in_channels, **sized, **args}
    model = _create(name, {**made, "pretrained": published}, config)
    if published and num_classes and (fresh_head or num_classes != config["num_classes"]):
        notify(
            f"the published weights of {name} are of {config['num_classes']:,} classes, the data has {num_classes:,}: "
            "the classifier is new, drawn from the seed."
        )
        if num_classes == config["num_classes"]:
            model.reset_classifier(num_classes)  # type: ignore[operator]
    return model


def timm_config(name: str) -> dict[str, Any]:
    """Return timm's configuration of the weights `timm:NAME`: their classes, input size, mean, std, crop, ...

    Raises:
        UnknownModelError: There is no such network or tag; the message has the nearest names.
        ModelError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"{name} needs timm: pip install 'kdpipe[timm]'.") from error
    plain = name.removeprefix(PREFIX)
    base, _, tag = plain.partition(".")
    if not timm.is_model(base):
        hint = did_you_mean(base, timm.list_models(), limit=3, otherwise="timm.list_models() has the names.")
        raise UnknownModelError(f"timm has no network {base!r}; {hint}")
    tags = [each.partition(".")[2] for each in timm.list_pretrained(base)]
    if tag and tag not in tags:
        raise UnknownModelError(f"timm has no weights {tag!r} of {base}; it has {', '.join(tags) or 'none'}.")
    found = timm.get_pretrained_cfg(plain) or timm.get_pretrained_cfg(base)
    return {} if found is None else asdict(found)


def timm_class_names(config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the names of each class of timm's weights, in order: WordNet ids first for ImageNet; [] if unknown."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    if names := config.get("label_names"):
        return [(each,) for each in names]
    if (subset := infer_imagenet_subset(dict(config))) is None:
        return []
    known: Any = ImageNetInfo(subset)
    return [(synset, *known.index_to_description(row).split(", ")) for row, synset in enumerate(known.label_names())]


def _is_resized(config: Mapping[str, Any], args: Mapping[str, Any], image_size: tuple[int, int]) -> bool:
    own = {"img_size", "dynamic_img_size"} & args.keys()
    return bool(config.get("fixed_input_size")) and not own and tuple(config["input_size"][1:]) != tuple(image_size)


def _create(name: str, made: Mapping[str, Any], config: Mapping[str, Any]) -> nn.Module:
    import timm

    try:
        with hub_or_cache(local=not made["pretrained"]) as why:
            model: nn.Module = timm.create_model(name.removeprefix(PREFIX), **made)
    except Exception as error:  # wrong arguments, or a download, which fails in many ways
        if not made["pretrained"]:
            raise ModelError(f"{name} cannot be built with args {dict(made)!r} ({cause(error)}).") from error
        raise ModelError(
            f"the published weights of {name} cannot be loaded ({hub_cause(error, why)}): fetch model.safetensors of "
            f"https://huggingface.co/{config.get('hf_hub_id')} elsewhere, and set model.weights to its path."
        ) from error
    return model
