"""Labels that are written as text: numbers 0, 1, ... C - 1, or names of classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from kdpipe.stages.data.image_set import UNLABELED
from kdpipe.stages.data.image_source import Names, name_at
from kdpipe.stages.data.sources.listing import numbered_classes
from kdpipe.stages.errors import DataError, first_few

LABEL_COLUMNS = ("label", "class", "class_name", "target", "category")


def class_names_of(title: str, labels: Iterable[str], where: Callable[[str], str]) -> tuple[str, ...]:
    """Return the classes of the different `labels`: "0", "1", ... up to the largest, if all are numbers; else sorted.

    The label "" is none: of unlabeled samples alone, no classes are known.

    Args:
        title: The data set's name.
        labels: The labels.
        where: Returns where a label is found, for messages.

    Raises:
        DataError: They are numbers that cannot be labels.
    """
    labels = [label for label in labels if label]
    if not labels:
        return ()
    if all(label.isascii() and label.isdigit() and str(int(label)) == label for label in labels):
        return numbered_classes(title, np.array(sorted(map(int, labels))))
    if all(map(_is_number, labels)):
        label = next(label for label in labels if not label.isdigit())
        raise DataError(f"{where(label)}: labels that are numbers must be 0, 1, ... C - 1, found {label!r}.")
    return tuple(sorted(labels))


def classes_of_labels(
    title: str, chosen: Names, train: Names, where: Callable[[int], str], where_in_train: Callable[[int], str]
) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Return the class names of the labels `train` [M], packed, and the numbers of the labels `chosen`, int64 [N].

    The number of the label "" is -1: unlabeled.

    Raises:
        DataError: The labels of `train` cannot be labels, or a chosen one is not among them.
    """
    known, first = np.unique(train, return_index=True)
    places = {name_at(known, number): int(index) for number, index in enumerate(first)}
    class_names = class_names_of(title, places, lambda label: where_in_train(places[label]))
    label_of = {"": UNLABELED, **{name: number for number, name in enumerate(class_names)}}
    found, first, inverse = np.unique(chosen, return_index=True, return_inverse=True)
    texts = [name_at(found, number) for number in range(len(found))]
    if unknown := [number for number, text in enumerate(texts) if text not in label_of]:
        raise DataError(
            f"{where(int(first[unknown[0]]))}: the class {texts[unknown[0]]!r} is missing from the train split: its "
            f"classes are {first_few(class_names)}."
        )
    return class_names, np.array([label_of[text] for text in texts], dtype=np.int64)[inverse]


def labels_of_lists(
    title: str, chosen: Sequence[str], train: Sequence[str], separator: str, where: Callable[[str], str]
) -> tuple[tuple[str, ...], npt.NDArray[np.float32]]:
    """Return the names of the K labels in cells such as "cat|dog" of `train`, sorted, and 0 or 1 of each in `chosen`.

    The cell "" is not known: NaN; one with the separator alone has none of the labels.

    Args:
        title: The data set's name.
        chosen: The cells of N samples.
        train: Those of the train split.
        separator: What is between two names.
        where: Returns where a cell is found, for messages.

    Returns:
        The names, and float32 [N, K].

    Raises:
        DataError: A name is empty, or missing from `train`, or no cell of that has the separator.
    """
    listed: dict[str, list[str]] = {}
    for text in dict.fromkeys((*train, *chosen)):
        names = [] if text in ("", separator) else [name.strip() for name in text.split(separator)]
        if "" in names:
            raise DataError(
                f"{where(text)}: there is an empty name in {text!r:.60}: write names between {separator!r}."
            )
        listed[text] = names
    class_names = tuple(sorted({name for text in dict.fromkeys(train) for name in listed[text]}))
    if not any(separator in text for text in dict.fromkeys(train)):
        raise DataError(
            f"{title}: no label has the separator {separator!r} (data.label_separator): found "
            f"{first_few(class_names, 3) or 'empty cells'}."
        )
    if not class_names:
        raise DataError(f"{title}: the labels of the train split have no name.")
    columns = {name: number for number, name in enumerate(class_names)}
    rows = np.zeros((len(chosen), len(class_names)), dtype=np.float32)
    for row, text in zip(rows, chosen, strict=True):
        if unknown := [name for name in listed[text] if name not in columns]:
            raise DataError(
                f"{where(text)}: the label {unknown[0]!r} is missing from the train split: its labels are "
                f"{first_few(class_names)}."
            )
        row[[columns[name] for name in listed[text]]] = 1
        if not text:
            row[:] = np.nan
    return class_names, rows


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
