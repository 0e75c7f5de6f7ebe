"""ImageNet-1k as it is published: Data/CLS-LOC with a folder for each training class, and all validation images in one.

The labels of the latter are in LOC_val_solution.csv. Those of the development kit,
ILSVRC2012_validation_ground_truth.txt, are numbers of another order, which its meta.mat alone states.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from kdpipe.stages.data.sources.split_folders import Role, role_of
from kdpipe.stages.data.sources.walk import SUFFIXES
from kdpipe.stages.errors import DataError, cause, first_few

LABELS = "LOC_val_solution.csv"

_LEVELS = 4
"""The label file lies beside ILSVRC, the validation images in ILSVRC/Data/CLS-LOC/val."""

_SYNSET = re.compile(r"n\d{8}")


def data_folder(path: Path) -> Path:
    """Return the folder of the splits where `path` is, or holds, the published folder ILSVRC; else `path`."""
    below = (path / "ILSVRC" / "Data" / "CLS-LOC", path / "Data" / "CLS-LOC")
    return next((folder for folder in below if (folder / "train").is_dir()), path)


def flat_val(train_classes: Collection[str], has_classes: Mapping[str, bool]) -> dict[Role, str]:
    """Return the folder of validation images that are not sorted by class; none if the classes are not ImageNet's.

    Args:
        train_classes: The class folders of the training split.
        has_classes: For each folder beside it, and itself, whether there are folders in it.
    """
    flat = [name for name, is_sorted in has_classes.items() if role_of(name) == "val" and not is_sorted]
    return {"val": flat[0]} if len(flat) == 1 and all(map(_SYNSET.fullmatch, train_classes)) else {}


def flat_val_files(folder: Path, class_names: Collection[str]) -> dict[str, str]:
    """Return the validation images keyed and sorted by CLASS/NAME, as if they were sorted by class.

    Raises:
        DataError: There is no file of labels, or it does not have a known class for each image.
    """
    labels = _labels(folder)
    files = {}
    for entry in os.scandir(folder):
        stem, suffix = os.path.splitext(entry.name)  # noqa: PTH122
        if suffix.lower() not in SUFFIXES or entry.name.startswith("."):
            continue
        if (label := labels.get(stem)) is None:
            raise DataError(
                f"{LABELS} has no label of {entry.path}: use the file that was published with these images."
            )
        if label not in class_names:
            raise DataError(
                f"{LABELS}: {entry.name} has the class {label!r}, which is missing from the train split: its classes "
                f"are {first_few(sorted(class_names))}."
            )
        files[f"{label}/{entry.name}"] = entry.path
    if not files:
        raise DataError(f"{folder} has no images.")
    return dict(sorted(files.items()))


def _labels(folder: Path) -> dict[str, str]:
    file = next((place / LABELS for place in list(folder.parents)[:_LEVELS] if (place / LABELS).is_file()), None)
    if file is None:
        raise DataError(
            f"{folder} has no class folders, and no folder above has {LABELS} with the labels of its images (the "
            "development kit's ILSVRC2012_validation_ground_truth.txt numbers classes in another order): copy it to "
            f"{folder.parent}, or sort the images into {folder.name}/<class>/."
        )
    try:
        with file.open(encoding="utf-8", newline="") as opened:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(opened)}
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, IndexError, AttributeError, TypeError) as error:
        raise DataError(
            f"{file} cannot be read: expected the columns ImageId and PredictionString ({cause(error)})."
        ) from error
