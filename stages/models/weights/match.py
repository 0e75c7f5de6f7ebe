"""Which of the state dicts in a weights file fits a network, under which key and prefix."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError
from kdpipe.stages.models.weights.file import Entries

PREFERRED = ("", "state_dict", "model", "model_state_dict", "net", "network")
"""Keys of the trained weights themselves, which are taken before others, such as averages, in this order."""

MAX_NAMED = 3

MAX_NAME_LENGTH = 80
"""Letters of a name in an untrusted file that are shown."""

# Names of entries in other code, and the names here.
RENAMED = (
    (re.compile(r"^(?:(?:module|_orig_mod)\.)+"), ""),  # DistributedDataParallel, torch.compile
    (re.compile(r"^block(\d)\.layer\.(\d+)\.convShortcut\."), r"layer\1.\2.shortcut."),  # RepDistiller's wide resnets
    (re.compile(r"^block(\d)\.layer\."), r"layer\1."),
    (re.compile(r"^linear\."), "fc."),  # RepDistiller's ResNet-50
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),  # torchvision's published densenets
)


@dataclass(frozen=True)
class Match:
    """A state dict in a file, with the names of the network.

    Attributes:
        key: The key under which it stands.
        prefix: The prefix of its entries, with its last dot.
        entries: The entries with that prefix, which is removed.
        num_left_out: The number of entries with another prefix.
        fresh: The entries that are the network's own, as its classifier is new.
        head: The entries of the file's classifier, which the network does not have.
        others: The places of other state dicts in the file that fit, too.
    """

    key: str
    prefix: str
    entries: Mapping[str, Any]
    num_left_out: int = 0
    fresh: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Key and prefix as in `weights_key`."""
        return ".".join(part for part in (self.key, self.prefix.removesuffix(".")) if part)

    @property
    def notices(self) -> list[str]:
        """Sentences on what was chosen, and left out."""
        where = (
            f"the weights under {self.place!r} are taken" if self.place else "the weights of the whole file are taken"
        )
        if self.num_left_out:
            where += f", and the other entries ({self.num_left_out:,}) are left out"
        if self.others:
            where += f"; it also has {', '.join(map(repr, self.others))} (model.weights_key chooses)"
        told = self.prefix or self.others or self.key not in PREFERRED[:4]
        head = f"the classifier ({', '.join(self.fresh)}) is new, drawn from the seed."
        without = f"the classifier ({', '.join(each[:MAX_NAME_LENGTH] for each in self.head[:MAX_NAMED])}) is left out."
        return [*([f"{where}."] * bool(told)), *([head] * bool(self.fresh)), *([without] * bool(self.head))]


def find_state_dict(
    model: nn.Module,
    state_dicts: Mapping[str, Entries],
    source: str,
    *,
    weights_key: str | None = None,
    fresh_head: int | None = None,
    without_head: bool = False,
) -> Match:
    """Return what fits `model`, of the state dicts in a file by key; see `load_weights`.

    Raises:
        ModelError: None fits, or several do.
    """
    matches = list(_matches(model, state_dicts, fresh_head))
    if without_head:
        matches = [_without_head(match, model) for match in matches]
    if weights_key is not None:
        matches = [match for match in matches if weights_key in (match.place, match.key)]
    expected = model.state_dict()
    fitting = [match for match in matches if not _misfits(match.entries, expected)]
    if not fitting:
        if not matches:
            found = ", ".join(repr(key) for key in state_dicts if key) or "none"
            raise ModelError(f"{source} has no weights under model.weights_key = {weights_key!r}; keys: {found}.")
        raise ModelError(f"{source} cannot be loaded into the model: {_why_none_fits(model, matches, fresh_head)}")
    distinct = {tuple(id(value) for value in match.entries.values()): match for match in reversed(fitting)}
    fitting = list(reversed(distinct.values()))
    places = [match.place for match in fitting]
    best = min(fitting, key=lambda match: _rank(match.key))
    if len([match for match in fitting if _rank(match.key) == _rank(best.key)]) > 1:
        raise ModelError(
            f"{source} has several networks that fit the model, {', '.join(map(repr, places))}: choose one with "
            "model.weights_key."
        )
    return replace(best, others=tuple(place for place in places if place != best.place))


def _rank(key: str) -> int:
    root = key.partition(".")[0]
    return PREFERRED.index(root) if root in PREFERRED else len(PREFERRED)


def _matches(model: nn.Module, state_dicts: Mapping[str, Entries], fresh_head: int | None) -> Iterator[Match]:
    """Yield each state dict with each prefix that enough of its entries have, whether they fit or not."""
    expected = model.state_dict()
    for key, entries in state_dicts.items():
        for prefix in _prefixes(entries, expected):
            own = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
            named = {name if name in expected else _renamed(name): value for name, value in own.items()}
            for name in expected:
                if name.endswith("num_batches_tracked"):  # absent before torch 0.4.1; counts steps, decides no output
                    named.setdefault(name, expected[name])
            fresh = _head_entries(model, named, fresh_head) if fresh_head is not None else ()
            named |= {name: expected[name] for name in fresh}
            yield Match(key, prefix, named, len(entries) - len(own), fresh)


def _without_head(match: Match, model: nn.Module) -> Match:
    """Return the match without the classifier: a layer, or modules below a name that the network does not have."""
    expected = model.state_dict()
    roots = {name.partition(".")[0] for name in expected}
    unknown = [name for name in match.entries if name not in expected]
    if len({name.rpartition(".")[0] for name in unknown}) > 1:
        unknown = [name for name in unknown if name.partition(".")[0] not in roots]
    kept = {name: value for name, value in match.entries.items() if name not in unknown}
    return replace(match, entries=kept, head=tuple(unknown))


def _prefixes(entries: Entries, expected: Mapping[str, Tensor]) -> list[str]:
    """Return "" and the dotted prefixes of at least half as many entries as the network has, the shortest first."""
    counts: Counter[str] = Counter()
    for name in entries:
        parts = name.split(".")
        counts.update("".join(f"{part}." for part in parts[:depth]) for depth in range(1, len(parts)))
    return ["", *sorted((one for one, count in counts.items() if 2 * count >= len(expected)), key=len)]


def _head_entries(model: nn.Module, named: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """Return the entries of the classifier: the last layer of `num_classes`, and those stored for other classes."""
    expected = model.state_dict()
    layers = [path for path, module in model.named_modules() if width_of(module) == num_classes]
    own = [name for name in expected if layers and name.rpartition(".")[0] == layers[-1]]
    stored = [
        name
        for name, value in named.items()
        if name in expected
        and isinstance(value, Tensor)
        and value.shape != expected[name].shape
        and value.shape[1:] == expected[name].shape[1:]
        and expected[name].shape[0] == num_classes
    ]
    return tuple(dict.fromkeys([*stored, *own]))


def width_of(module: nn.Module) -> int | None:
    """Return the number of outputs of a linear layer or a convolution; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.out_channels if isinstance(module, nn.Conv2d) else None


def _why_none_fits(model: nn.Module, matches: Sequence[Match], fresh_head: int | None) -> str:
    """Return the faults of the state dict that comes nearest, and what to do."""
    expected = model.state_dict()
    best = max(matches, key=lambda match: sum(name in expected for name in match.entries))
    where = f" (under {best.place!r})" if best.place else ""
    faults = f"{'; '.join(_misfits(best.entries, expected))}{where}. "
    if fresh_head is None and (num_classes := _classes_of(model)) is not None:
        head = _head_entries(model, best.entries, num_classes)
        if not _misfits({**best.entries, **{name: expected[name] for name in head}}, expected):
            return faults + (
                "Only its classifier differs: if the data's classes are among those of the weights, name these in "
                "model.classes ('published' for a library's weights, or a file), else set model.fresh_head = true for "
                "a new classifier, and train it."
            )
    return faults + "Check the model's name, args and number of classes."


def _classes_of(model: nn.Module) -> int | None:
    """Return the number of outputs of the last layer."""
    return next((width for module in reversed(list(model.modules())) if (width := width_of(module))), None)


def _renamed(key: str) -> str:
    for pattern, name in RENAMED:
        key = pattern.sub(name, key)
    return key


def _misfits(stored: Mapping[str, Any], expected: Mapping[str, Tensor]) -> list[str]:
    """List missing and unexpected entries and wrong shapes or types, the first few of each; empty where all fit."""
    here = {key: stored[key] for key in expected if key in stored}
    reshaped = [
        f"{key} is stored as {_shape(value)}, wanted {list(expected[key].shape)}"
        for key, value in here.items()
        if _shape(value) != list(expected[key].shape)
    ]
    retyped = [
        f"{key} is stored as {kind}" for key, value in here.items() if (kind := _wrong_type(value, expected[key]))
    ]
    return [
        *_first_few("missing ", [key for key in expected if key not in stored]),
        *_first_few("unexpected ", [key[:MAX_NAME_LENGTH] for key in stored if key not in expected]),
        *_first_few("", reshaped or retyped),
    ]


def _shape(value: Any) -> list[int] | str:
    return list(value.shape) if isinstance(value, Tensor) else "no tensor"


def _wrong_type(value: Any, expected: Tensor) -> str | None:
    """Describe why a tensor cannot be converted to the type of `expected` without loss; None where it can."""
    if not isinstance(value, Tensor):
        return None  # reported as a wrong shape
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        kind = "meta" if value.is_meta else "quantized" if value.is_quantized else "sparse"
        return f"a {kind} tensor, wanted numbers"
    if value.is_complex() or (expected.is_floating_point() and not value.is_floating_point()):
        return f"{value.dtype}, wanted {expected.dtype}".replace("torch.", "")
    return None


def _first_few(kind: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = f" and {len(entries) - MAX_NAMED} more" if len(entries) > MAX_NAMED else ""
    return [f"{kind}{', '.join(entries[:MAX_NAMED])}{more}"]


def remove_head(model: nn.Module) -> None:
    """Remove the last layer, a linear or a convolution: the network then returns what went into it."""
    path = [path for path, module in model.named_modules() if width_of(module) is not None][-1]
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())


def replace_head(model: nn.Module, published_classes: int, num_classes: int) -> None:
    """Replace the last layer of `published_classes`, a linear or a convolution, by a new one of `num_classes`."""
    path, head = [(path, module) for path, module in model.named_modules() if width_of(module) == published_classes][-1]
    parent, _, name = path.rpartition(".")
    bias = head.bias is not None
    fresh = (
        nn.Conv2d(head.in_channels, num_classes, head.kernel_size, bias=bias)  # type: ignore[arg-type]
        if isinstance(head, nn.Conv2d)
        else nn.Linear(head.in_features, num_classes, bias=bias)
    )
    setattr(model.get_submodule(parent), name, fresh)
