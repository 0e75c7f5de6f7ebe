"""Image classifiers of Hugging Face transformers: `hf:OWNER/NAME` of the hub, or `hf:FOLDER`.

transformers takes seconds to import, so it is imported only when needed. Code of a repository is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from kdpipe.stages.errors import ModelError, cause
from kdpipe.stages.models.arguments import refuse_unknown_args
from kdpipe.stages.models.libraries.torchvision import Resizing
from kdpipe.stages.models.weights.match import replace_head
from kdpipe.stages.models.weights.state_dict import load_entries
from kdpipe.stages.runtime.hub import hub_cause, hub_or_cache

PREFIX = "hf:"

SET_HERE = ("num_labels", "id2label", "label2id", "num_channels")
"""Entries of a configuration that follow from the data."""

NO_ARGS = ("id2label", "label2id", "transformers_version", "dtype", "torch_dtype", "_name_or_path")
"""Entries of a configuration that do not decide what the network is."""

TOWERS = {
    "clip": "CLIPVisionModelWithProjection",
    "siglip": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
}
"""The image towers, which return embeddings, of networks that have another one for texts, by `model_type`."""

CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"


def build_transformer(
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
    """Build the image classifier `hf:NAME`, which returns an object with `logits` [B, num_classes].

    With `num_classes` 0 it is the network without a classifier, which returns an object with an embedding.

    Its configuration is that of the hub or folder, changed by `args`; with `model_type` in `args` it is these alone.
    Published weights are read from safetensors only, with a new classifier where they are of other classes, of which
    `notify` receives a sentence.

    Raises:
        ModelError: There is no such network or weights file, or no transformers.
    """
    library = _library(name)
    refuse_unknown_args(name, args, None, SET_HERE)
    config = _config(library, name, args)
    images = getattr(config, "vision_config", config)
    if hasattr(images, "image_size") and "image_size" not in args.get("vision_config", args):
        images.image_size = image_size[0] if image_size[0] == image_size[1] else list(image_size)
    if hasattr(images, "num_channels"):
        images.num_channels = in_channels
    try:
        if not num_classes:
            return _trunk(library, name, config, published)
        if not published:
            config.num_labels = num_classes
            config.architectures = config.architectures or [_class_name(library, config)]
            model: nn.Module = library.AutoModelForImageClassification.from_config(config)
            return model
        model = _pretrained(library.AutoModelForImageClassification, name, config)
    except ModelError:
        raise
    except Exception as error:  # wrong entries of the configuration, or files that are absent or damaged
        raise ModelError(f"{name} cannot be built ({cause(error)}).") from error
    if fresh_head or num_classes != config.num_labels:
        notify(
            f"the published weights of {name} are of {config.num_labels:,} classes, the data has {num_classes:,}: the "
            "classifier is new, drawn from the seed."
        )
        replace_head(model, config.num_labels, num_classes)
    return model


def recorded_args(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole configuration of `hf:NAME`, from which the network is built without a hub or folder."""
    found: dict[str, Any] = _config(_library(name), name, args).to_diff_dict()
    dropped = {*SET_HERE, *NO_ARGS, *({"image_size"} - args.keys())}
    return {key: value for key, value in found.items() if key not in dropped}


RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which processors' configurations have."""


def image_scaling(name: str) -> dict[str, Any]:
    """Return the image processor's configuration of `hf:NAME`: `image_mean`, `image_std`, `size`; {} without one."""
    from kdpipe.store.errors import KdpipeError
    from kdpipe.store.fs.safe_read import read_json

    try:
        found = read_json(_file(name, PROCESSOR), 2**20)
    except (OSError, ValueError, KdpipeError):
        return {}
    return found if isinstance(found, dict) else {}


def image_resizing(name: str) -> Resizing:
    """Return how the image processor of `hf:NAME` resizes and crops; a processor without a crop squeezes images."""
    record = image_scaling(name)
    size, crop_size = record.get("size"), record.get("crop_size")
    height, width = _sides(crop_size if crop_size and record.get("do_center_crop", True) else size)
    shortest = size.get("shortest_edge") if isinstance(size, dict) else size
    crop = record.get("crop_pct")
    if crop is None and isinstance(shortest, int) and crop_size and record.get("do_center_crop", True):
        crop = min(1.0, height / shortest) if isinstance(height, int) else None
    resample = RESAMPLING.get(record.get("resample"))  # type: ignore[arg-type]
    known = isinstance(height, int) and isinstance(width, int)
    return (height, width) if known else None, crop, resample


def _sides(size: Any) -> tuple[Any, Any]:
    """Return height and width of a size in a processor's configuration."""
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        return size.get("height", edge), size.get("width", edge)
    return size, size


def class_names(name: str, args: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the names of each class of `hf:NAME`, in order; [] if it has placeholders."""
    names: dict[int, str] = _config(_library(name), name, args).id2label
    if all(text == f"LABEL_{number}" for number, text in names.items()):
        return []
    return [tuple(part for part in (*names[row].split(", "), names[row])) for row in sorted(names)]


def num_labels(name: str, args: Mapping[str, Any]) -> int:
    """Return the number of classes of the weights `hf:NAME`."""
    return int(_config(_library(name), name, args).num_labels)


def _library(name: str) -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(f"{name} needs transformers: pip install 'kdpipe[transformers]'.") from error
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return transformers


def _place(name: str) -> str:
    """Return the folder, or the repository of the hub."""
    plain = name.removeprefix(PREFIX)
    folder = Path(plain).expanduser()
    return str(folder) if folder.is_dir() else plain


def _file(name: str, file: str) -> Path:
    """Return the path of a file of the folder, or of the hub's cache. Raises OSError or ValueError without it."""
    place = _place(name)
    if Path(place).is_dir():
        return Path(place) / file
    from huggingface_hub import hf_hub_download

    with hub_or_cache():
        return Path(hf_hub_download(place, file))


def _config(library: ModuleType, name: str, args: Mapping[str, Any]) -> Any:
    if name == PREFIX:
        raise ModelError("hf: names no network: write hf:OWNER/NAME, or hf:FOLDER.")
    why = ""
    try:
        if "model_type" in args:
            return library.AutoConfig.for_model(**args)
        with hub_or_cache(local=Path(_place(name)).is_dir()) as why:
            return library.AutoConfig.from_pretrained(_place(name), trust_remote_code=False, **args)
    except Exception as error:  # no network, no such repository, no valid configuration
        raise ModelError(
            f"the configuration of {name} cannot be loaded ({hub_cause(error, why)}): fetch {CONFIG}, {PROCESSOR} and "
            f"{WEIGHTS} elsewhere into one folder, and name it as hf:FOLDER."
        ) from error


def _class_name(library: ModuleType, config: Any) -> str:
    """Return the plain image classifier of a configuration: DeiT has two."""
    found = library.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    return str((found[0] if isinstance(found, tuple | list) else found).__name__)


def _trunk(library: ModuleType, name: str, config: Any, published: bool) -> nn.Module:
    """Return the network without a classifier: the image tower of one that has another for texts.

    A linear layer on the class token (`pooler`), which many weights lack, is left out.
    """
    tower = TOWERS.get(config.model_type)
    loader: Any = getattr(library, tower) if tower else library.AutoModel
    if tower and hasattr(config, "projection_dim"):  # the width that weights of both towers have
        config.vision_config.projection_dim = config.projection_dim
    config = config.vision_config if tower else config
    if TOWERS["clip"] in (config.architectures or []):  # saved without the other tower
        tower, loader = TOWERS["clip"], library.CLIPVisionModelWithProjection
    build = loader if tower else loader.from_config
    model: Any = _pretrained(loader, name, config) if published else build(config)
    if hasattr(getattr(model, "pooler", None), "dense"):
        model.pooler = None
    return model  # type: ignore[no-any-return]


def _pretrained(loader: Any, name: str, config: Any) -> nn.Module:
    try:
        with hub_or_cache(local=Path(_place(name)).is_dir()) as why:
            model, found = loader.from_pretrained(
                _place(name),
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
            )
    except OSError as error:
        raise ModelError(
            f"the published weights of {name} cannot be loaded ({hub_cause(error, why)}): fetch {CONFIG}, {PROCESSOR} "
            f"and {WEIGHTS} elsewhere into one folder, and name it as hf:FOLDER."
        ) from error
    if wrong := sorted(key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]):
        raise ModelError(
            f"{name}: {wrong[0]} in the weights has another shape than in the network: set data.image_size to the size "
            "of its training, or change its args."
        )
    if absent := sorted(key for key in found["missing_keys"] if not key.startswith("pooler.dense.")):
        raise ModelError(f"{name}: its weights lack {absent[0]}, which would stay random: it is no trained classifier.")
    load_entries(model, {"": model.state_dict()}, name)  # refuses NaN
    built: nn.Module = model
    return built
