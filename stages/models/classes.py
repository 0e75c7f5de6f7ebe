"""Networks of more classes than the data has: the rows of their classifier that belong to the data's classes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from kdpipe.stages.data.tasks import CLASSIFICATION, Task
from kdpipe.stages.errors import ModelError, RecipeError, cause, first_few
from kdpipe.stages.models.build import PUBLISHED, ModelConfig, build_model, weights_path
from kdpipe.stages.models.libraries.by_name import class_names_of_weights, num_published_classes, prefix_of
from kdpipe.stages.models.registry import SMALL_IMAGE_NETWORKS
from kdpipe.stages.models.user_models import is_user_model

WORDNET_ID = re.compile(r"(n\d{8})[\s,]+(.+)")


def build_for_classes(
    config: ModelConfig,
    class_names: Sequence[str],
    *,
    in_channels: int,
    image_size: tuple[int, int],
    seed: int,
    notify: Callable[[str], None] = lambda notice: None,
    task: Task = CLASSIFICATION,
) -> nn.Module:
    """Build a network for these classes: as `build_model`, or with the rows of those among `config.classes`.

    Without classes it has no classifier.

    Raises:
        RecipeError: A class is not among the network's, or several of that name are.
        ModelError: As `build_model`, or the network does not end in a classifier of one layer.
    """
    shape: dict[str, Any] = {"in_channels": in_channels, "image_size": image_size, "seed": seed}
    shape |= {"notify": notify, "task": task}
    if config.classes is None:
        if class_names:
            _require_same_order(config, class_names, notify)
        return build_model(config, num_classes=len(class_names), **shape)
    known = read_class_list(config)
    rows = rows_of_classes(class_names, known, config.classes)
    model = build_model(replace(config, classes=None), num_classes=len(known), **shape)
    _select_classes(model, rows, len(known), (in_channels, *image_size), config.name)
    found = [f"{name} is {row}" for name, row in zip(class_names, rows, strict=True)]
    notify(f"{config.name} keeps {len(rows)} of its {len(known):,} classes: {first_few(found)}.")
    return model


def _require_same_order(config: ModelConfig, class_names: Sequence[str], notify: Callable[[str], None]) -> None:
    """Compare the classes of published weights with the data's, where there are as many and both have names.

    Raises:
        RecipeError: A class is another output of the network.
    """
    if config.weights != PUBLISHED or config.fresh_head or config.name in SMALL_IMAGE_NETWORKS:
        return
    if is_user_model(config.name) or len(known := class_names_of_weights(config.name, config.args)) != len(class_names):
        return
    outputs = _outputs_by_name(known)
    found = [outputs.get(_plain(name), set()) for name in class_names]
    for row, (name, rows) in enumerate(zip(class_names, found, strict=True)):
        if rows and row not in rows:
            raise RecipeError(
                f"class {row} of the data is {name!r}, which is output {min(rows)} of {config.name}: set the model's "
                "classes = 'published', which takes the outputs by the names of their classes."
            )
    if not any(found):
        notify(
            f"the classes of {config.name} ({known[0][0]}, ...) and of the data ({class_names[0]}, ...) have no name "
            "in common: their order is not checked."
        )


def class_names_of(config: ModelConfig) -> tuple[str, ...]:
    """Return the names of the classes that a network with given weights tells apart; none if they are not known.

    Raises:
        RecipeError: As `read_class_list`.
    """
    if config.classes is not None:
        return tuple(names[0] for names in read_class_list(config))
    if config.weights != PUBLISHED and prefix_of(config.name) is None:
        return ()
    known = tuple(names[0] for names in class_names_of_weights(config.name, config.args))
    return known or tuple(f"class {number}" for number in range(num_published_classes(config.name, config.args)))


def read_class_list(config: ModelConfig) -> list[tuple[str, ...]]:
    """Return the names of each class of the network that `config` describes, in the order of its outputs.

    `config.classes` is "published", or a file: a text with one class a line, where names of the same class are
    separated by tabs or commas, or a WordNet id comes first; or JSON with a list, a table by number, or what timm and
    transformers write (`label_names`, `id2label`).

    Raises RecipeError if the file cannot be read, or is no such list.
    """
    assert config.classes is not None
    if config.classes == PUBLISHED:
        by_name = config.weights == PUBLISHED or (config.weights is not None and prefix_of(config.name))
        if not (names := class_names_of_weights(config.name, config.args) if by_name else []):
            raise RecipeError(
                "model.classes = 'published' is for published weights whose classes have names: give a file with a "
                "class a line."
            )
        return names
    path = weights_path(config.classes)
    try:
        text = path.read_text()
        entries = list(_entries(json.loads(text))) if path.suffix == ".json" else text.strip().splitlines()
        classes = [tuple(_names(entry)) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RecipeError(f"model.classes: {path} is no list of class names ({cause(error)}).") from error
    if not classes or not all(classes):
        raise RecipeError(f"model.classes: {path} has {len(classes)} classes, and not all have a name.")
    return classes


def _entries(content: Any) -> Iterator[Any]:
    for key in ("pretrained_cfg", "id2label", "label_names"):
        content = content[key] if isinstance(content, dict) and key in content else content
    if isinstance(content, dict):
        yield from (content[key] for key in sorted(content, key=int))
    else:
        yield from content


def _names(entry: str | list[str]) -> Iterator[str]:
    """Yield the names of a class."""
    if isinstance(entry, list):
        yield from entry
        return
    entry = entry.strip()
    if match := WORDNET_ID.fullmatch(entry):
        yield match[1]
        entry = match[2]
    parts = [part.strip() for part in re.split(r"\t|, ", entry) if part.strip()]
    yield from [*parts, entry] if len(parts) > 1 else parts


def rows_of_classes(
    class_names: Sequence[str], known: Sequence[Sequence[str]], where: str, key: str = "model.classes"
) -> list[int]:
    """Return the position of each of the data's classes among the `known` ones of `where`, which `key` names.

    Raises:
        RecipeError: A class is not among them, several of that name are, or two of the data are the same one.
    """
    rows_of = _outputs_by_name(known)
    found = [sorted(rows_of.get(_plain(name), ())) for name in class_names]
    absent = [name for name, rows in zip(class_names, found, strict=True) if not rows]
    if absent:
        raise RecipeError(
            f"{key}: {len(absent)} of the data's {len(class_names)} classes are not among the {len(known):,} "
            f"of {where}: {first_few(absent)}. {_near_names(absent[0], known)}Name them as there, or give a "
            f"file with a line for each class of the weights, which may have several names separated by tabs, as {key}."
        )
    for name, rows in zip(class_names, found, strict=True):
        if len(rows) > 1:
            raise RecipeError(f"{key}: {where} has several classes {name!r}, {rows}: give them other names.")
    rows = [one for one, *_ in found]
    if twice := [name for name, row in zip(class_names, rows, strict=True) if rows.count(row) > 1]:
        raise RecipeError(f"{key}: the data's classes {first_few(twice)} are the same class of {where}.")
    return rows


def _near_names(name: str, known: Sequence[Sequence[str]]) -> str:
    """Return a sentence of known classes that have a word of `name`, or of the first ones."""
    words = set(_plain(name).split())
    near = [names for names in known if any(words & set(_plain(each).split()) for each in names)]
    if near:
        return f"{name!r} may be {first_few([' = '.join(names[:2]) for names in near])}. "
    return f"It has {first_few([names[0] for names in known])}. "


def _outputs_by_name(known: Sequence[Sequence[str]]) -> dict[str, set[int]]:
    rows_of: dict[str, set[int]] = {}
    for row, names in enumerate(known):
        for name in names:
            rows_of.setdefault(_plain(name), set()).add(row)
    return rows_of


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _select_classes(
    model: nn.Module, rows: Sequence[int], num_classes: int, image_shape: tuple[int, int, int], name: str
) -> None:
    """Keep only `rows` of the last layer of `num_classes`, in place. Raises ModelError if the logits do not follow."""
    heads = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and len(module.weight) == num_classes
    ]
    was_training, images = model.training, torch.linspace(-1, 1, 2 * math.prod(image_shape)).view(2, *image_shape)
    model.eval()
    with torch.no_grad():
        wanted = model(images)[:, list(rows)]
        for head in heads[-1:]:
            _keep_rows(head, list(rows))
        try:
            logits = model(images)
        except RuntimeError:  # of other layers, for another number of classes
            logits = images
    model.train(was_training)
    if logits.shape != wanted.shape or not torch.allclose(logits, wanted, atol=1e-4, rtol=1e-3):
        raise ModelError(
            f"{name} does not end in one linear layer or convolution of {num_classes:,} classes: select those of the "
            "data (model.classes) in a python: factory."
        )


def _keep_rows(head: nn.Linear | nn.Conv2d, rows: list[int]) -> None:
    for key in ("weight", "bias"):
        tensor = getattr(head, key)
        if tensor is not None:
            setattr(head, key, nn.Parameter(tensor[rows].clone(), requires_grad=tensor.requires_grad))
    setattr(head, "out_features" if isinstance(head, nn.Linear) else "out_channels", len(rows))
