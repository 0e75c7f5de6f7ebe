"""Recognize the folders of the splits of a data set by their usual names, in any case."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from kdpipe.stages.errors import DataError

Role = Literal["train", "test", "val"]

_NAMES: dict[Role, tuple[str, ...]] = {
    "train": ("train", "training", "trn"),
    "test": ("test", "testing", "tst"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
}
_ENDING = r"([ _-]?(set|data|images|split))?"
_ROLES = {role: re.compile(f"({'|'.join(names)}){_ENDING}", re.IGNORECASE) for role, names in _NAMES.items()}

LOOKED_FOR = "train, test and val (or training, testing, valid, validation, dev, eval; in any case, also as train_set)"


def role_of(name: str) -> Role | None:
    """Return the split that a folder's name stands for; None for any other name.

    >>> role_of("Training"), role_of("test_set"), role_of("trainer")
    ('train', 'test', None)
    """
    return next((role for role, pattern in _ROLES.items() if pattern.fullmatch(name)), None)


def split_folders(path: Path, has_classes: Mapping[str, bool]) -> dict[Role, str]:
    """Return the name of each split's folder; empty if `path` holds one folder for each class.

    Args:
        path: The folder of the data set.
        has_classes: For each of its folders, whether there are folders in it.

    Raises:
        DataError: The folders can be meant in more than one way.
    """
    roles = {name: role for name in has_classes if (role := role_of(name))}
    with_classes = [name for name in roles if has_classes[name]]
    found = f"{path.absolute()} has the folders {', '.join(has_classes)}"
    if not with_classes:
        if len(set(roles.values())) > 1 or len(roles) == len(has_classes) > 0:
            raise DataError(
                f"{found}: {', '.join(roles)} have no class folders in them. Sort the images into "
                "PATH/train/<class>/ and PATH/test/<class>/, or PATH/<class>/; for training images without labels, set "
                "data.labels = 'none'."
            )
        return {}
    chosen: dict[Role, str] = {}
    for role in _NAMES:
        named = [name for name in with_classes if roles[name] == role]
        if len(named) > 1 and role not in named:
            raise DataError(
                f"{found}: {' and '.join(named)} both stand for {role}: remove one, or rename it to {role}."
            )
        if named:
            chosen[role] = role if role in named else named[0]
    if "train" not in chosen:
        raise DataError(f"{found}, with a {next(iter(chosen))} split, but no train split: looked for {LOOKED_FOR}.")
    return chosen


def notices_of_splits(path: Path, folders: Mapping[str, bool], chosen: Mapping[Role, str]) -> list[str]:
    """Return what was found where it is not plain: unusual names of splits, and folders that are not used."""
    notices = []
    test = chosen.get("test", chosen.get("val"))
    used = [chosen["train"], *([test] if test else [])]
    if set(used) - set(_NAMES):
        notices.append(f"{path}: {used[0]} is the training split" + (f", {test} the test split." if test else "."))
    if unused := [name for name in folders if name not in used]:
        notices.append(f"{path}: the folders {', '.join(unused)} are not used.")
    return notices
