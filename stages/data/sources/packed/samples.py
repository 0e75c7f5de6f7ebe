"""Samples in files that hold many: an image NAME.jpg and its label NAME.cls, or NAME.json with a label in it.

This is WebDataset's convention: NAME is what is before the first dot of the last part of a path.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from sys import intern

import numpy as np

from kdpipe.stages.data.decode import DecodeSpec
from kdpipe.stages.data.image_files import ImageFileList
from kdpipe.stages.data.image_source import ImageSource, Names, name_at
from kdpipe.stages.data.sources.image_folder import sample_id
from kdpipe.stages.data.sources.label_names import LABEL_COLUMNS, classes_of_labels
from kdpipe.stages.data.sources.listing import Listing
from kdpipe.stages.data.sources.walk import SUFFIXES
from kdpipe.stages.errors import DataError, cause

MAX_LABEL_BYTES = 2**20
"""A larger member is no label: it is not read."""

_LABEL_KEYS = (*LABEL_COLUMNS, "cls")


@dataclass(slots=True)
class _Sample:
    """What is known of a sample so far; there may be millions of them, so that it has no containers.

    Attributes:
        first: The name of its first member.
        image: The name of its image.
        number: The number of that member.
        others: The names of further images, which it must not have.
        cls: The label in NAME.cls.
        json: The label in NAME.json.
    """

    first: str = ""
    image: str = ""
    number: int = 0
    others: tuple[str, ...] = ()
    cls: str | None = None
    json: str | None = None


class Grouping:
    """Collects the members of one file, whose path is `file`, to samples."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._samples: dict[str, _Sample] = {}

    def add(self, name: str, number: int, size: int, read: Callable[[], bytes]) -> None:
        """Add the member `name`, which the caller calls `number`.

        Raises:
            DataError: It is a label that cannot be read.
        """
        folder, slash, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if not stem:
            return
        sample, suffix = self._samples.setdefault(folder + slash + stem, _Sample()), suffix.lower()
        sample.first = sample.first or name
        if os.path.splitext(f".{suffix}")[1] in SUFFIXES or f".{suffix}" in SUFFIXES:  # noqa: PTH122
            if sample.image:
                sample.others += (name,)
            else:
                sample.image, sample.number = name, number
        elif suffix in ("cls", "json"):
            where = f"{self._file}: {name}"
            if size > MAX_LABEL_BYTES:
                raise DataError(f"{where} has {size:,} bytes: a label is a number or a name.")
            setattr(sample, suffix, intern(_label(read(), where, is_json=suffix == "json")))

    def finish(self) -> tuple[list[str], list[int], list[str]]:
        """Return the names and numbers of the images, and their labels, "" of those without.

        Raises:
            DataError: A sample has not one image.
        """
        names, numbers, labels = [], [], []
        for sample in self._samples.values():
            if not sample.image and sample.cls is None and sample.json is None:  # other files, such as a README
                continue
            if not sample.image or sample.others:
                found = ", ".join(filter(None, (sample.image, *sample.others))) or "none"
                raise DataError(f"{self._file}: {sample.first}: the sample must have one image, found {found}.")
            names.append(sample.image)
            numbers.append(sample.number)
            labels.append(sample.cls or sample.json or "")
        return names, numbers, labels


def _label(data: bytes, where: str, *, is_json: bool) -> str:
    """Return a label as text; "" if a JSON object has none."""
    try:
        text = data.decode().strip()
        found = json.loads(text) if is_json else text
    except ValueError as error:
        raise DataError(f"{where} cannot be read as a label ({cause(error)}).") from error
    if is_json:
        keys = [key for key in found if key.lower() in _LABEL_KEYS] if isinstance(found, dict) else []
        if len(keys) > 1:
            raise DataError(f"{where} has several labels ({', '.join(keys)}): keep one.")
        found = found[keys[0]] if keys else ""
    if isinstance(found, bool) or not isinstance(found, int | str) or (not is_json and not found) or "\0" in str(found):
        raise DataError(f"{where}: the label must be a whole number or a name, found {found!r:.60}.")
    return str(found)


@dataclass(frozen=True, eq=False)
class PackedSamples:
    """N samples of one split: their images, and their keys, which are unique, and labels, packed."""

    source: ImageSource
    keys: Names
    labels: Names


def list_packed(title: str, place: Path, chosen: PackedSamples, train: PackedSamples, spec: DecodeSpec) -> Listing:
    """List the samples `chosen` of a split, sorted by key, of which a sample's id is a hash.

    Args:
        title: The data set's name.
        place: What the scan is cached by.
        chosen: The samples.
        train: Those of the train split, which defines the classes, or of a set without splits.
        spec: What the images are decoded to.

    Raises:
        DataError: A label is no class of the train split.
    """
    class_names, labels = classes_of_labels(title, chosen.labels, train.labels, chosen.source.where, train.source.where)
    order = np.argsort(chosen.keys, kind="stable")
    keys = (name_at(chosen.keys, index) for index in order.tolist())
    sample_ids = np.fromiter(map(sample_id, keys), dtype=np.int64, count=len(order))
    files = ImageFileList(title, place, chosen.source.take(order), sample_ids, spec)
    return Listing(title, labels[order], sample_ids, class_names, files)
