"""`hf_dataset:OWNER/NAME` or `hf_dataset:FOLDER`: data sets of Hugging Face's library `datasets`.

The library downloads them and keeps them as memory-mapped Arrow files, of which one row is read at a time.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from kdpipe.stages.data.decode import DecodeSpec
from kdpipe.stages.data.image_files import ImageFileList
from kdpipe.stages.data.image_set import UNLABELED
from kdpipe.stages.data.image_source import NO_STAMP, EncodedImages, Stamp, pack_names, stamp
from kdpipe.stages.data.sources.label_names import LABEL_COLUMNS, classes_of_labels
from kdpipe.stages.data.sources.listing import Listing, Targets, has_target, numbers, target_rows
from kdpipe.stages.data.sources.packed.hf_hub import load_hf_dataset
from kdpipe.stages.data.sources.split_folders import Role, role_of
from kdpipe.stages.data.sources.table import Columns
from kdpipe.stages.data.splits import Indices, Split
from kdpipe.stages.data.tasks import CLASSIFICATION, MULTILABEL, Task
from kdpipe.stages.errors import DataError, cause, first_few


@dataclass(frozen=True, eq=False)
class ArrowRows(EncodedImages):
    """N images in the rows of a data set.

    Attributes:
        rows: A `datasets.Dataset` with the column of images alone, encoded or as paths.
        column: The column's name.
        name: The name of the data set and split, for messages.
        positions: int64 [N].
        files_stamp: The stamp of the Arrow files, as of one.
    """

    rows: Any
    column: str
    name: str
    positions: Indices
    files_stamp: Stamp

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, indices: Indices) -> Self:
        return type(self)(self.rows, self.column, self.name, self.positions[indices], self.files_stamp)

    def where(self, index: int) -> str:
        return f"{self.name}, row {self.positions[index]}"

    def stamp(self, index: int) -> Stamp:
        return self.files_stamp

    def read(self, index: int) -> bytes:
        cell = self.rows[int(self.positions[index])][self.column]
        found: bytes | None = cell["bytes"] if isinstance(cell, dict) else cell
        if found is not None:
            return found
        path = cell.get("path") if cell else None
        if path is None:
            raise FileNotFoundError(errno.ENOENT, "the cell is empty")
        return Path(path).read_bytes()


def list_hf_dataset(
    text: str,
    folder: Path,
    split: Split,
    spec: DecodeSpec,
    *,
    columns: Columns = (None, None),
    download: bool = True,
    unlabeled: bool = False,
    task: Task = CLASSIFICATION,
) -> Listing:
    """List one split, in its order, to be decoded to `spec`; a sample's id is its position.

    Args:
        text: OWNER/NAME, OWNER/NAME:CONFIG, or a folder as the recipe names it.
        folder: The same as a path; it comes first.
        split: The split.
        spec: What the images are decoded to.
        columns: The names of the columns of images and labels; None where only one can be meant.
        download: Whether the hub may be asked; otherwise the library's cache must have it.
        unlabeled: Whether there need be no column of labels.
        task: With "multilabel" a column has lists of classes, or several have 0 or 1; with "regression" numbers.

    Raises:
        DataError: It cannot be found or read, or its splits or columns are unclear.
    """
    title = f"hf_dataset:{folder.name if folder.is_dir() else text}"
    found = load_hf_dataset(text, folder, title, download=download)
    features = next(iter(found.values())).features
    several = columns[1] if isinstance(columns[1], tuple) else ()
    first = several[0] if isinstance(columns[1], tuple) else columns[1]
    image, label = choose_columns(title, features, (columns[0], first), unlabeled=unlabeled or task != CLASSIFICATION)
    splits, notices = _splits(title, found, label)
    unsplit, train = "test" not in splits, splits["train"]
    name, chosen = train if unsplit or split == "train" else splits["test"]
    where = f"{title} ({name})"
    targets = None
    if task == CLASSIFICATION:
        class_names, labels = _labels(title, where, chosen, train[1], label)
    else:
        class_names, targets = _targets(
            where, chosen, train[1], several or (label or _column_of_lists(title, chosen),), task
        )
        labels = has_target(targets)
    ids = np.arange(len(labels), dtype=np.int64)
    files = ImageFileList(title, folder if unsplit else folder / split, _rows(where, chosen, image), ids, spec)
    return Listing(title, labels, ids, class_names, files, unsplit, notices if split == "train" else (), targets)


def _splits(
    title: str, found: Mapping[str, Any], label: str | None
) -> tuple[dict[Literal["train", "test"], tuple[str, Any]], tuple[str, ...]]:
    """Return name and data set of the train and the test split, without the latter if there is only one, and notices.

    The validation split is the test split if there is no other, or if the labels of the other are secret.
    """
    if len(found) == 1:
        return {"train": next(iter(found.items()))}, ()
    names: dict[Role, str] = {role: name for name in found if (role := role_of(name))}
    test = names.get("test", names.get("val"))
    if label and {"test", "val"} <= set(names) and {*_cells(found[names["test"]], label)} <= {None, UNLABELED}:
        test = names["val"]
    if "train" not in names or test is None:
        raise DataError(f"{title} has the splits {', '.join(found)}: expected train and test (or validation).")
    unused = [name for name in found if name not in (names["train"], test)]
    told = [f"the test split is its {test} split"] if test != names.get("test") else []
    told += [f"not used: {', '.join(unused)}"] if unused else []
    notices = (f"{title}: {'; '.join(told)}.",) if told else ()
    return {"train": (names["train"], found[names["train"]]), "test": (test, found[test])}, notices


def choose_columns(
    title: str, features: Mapping[str, Any], wanted: tuple[str | None, str | None], *, unlabeled: bool = False
) -> tuple[str, str | None]:
    """Return the names of the columns of images and labels; None where `unlabeled` and there is none.

    Raises:
        DataError: Not one column can be meant.
    """
    import datasets

    described = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())

    def only(what: str, key: str, name: str | None, *candidates: list[str]) -> str:
        if name is not None and name in features:
            return name
        found = next(filter(None, candidates), []) if name is None else []
        if len(found) != 1:
            which = f"several: {', '.join(found)}" if found else "none"
            which = which if name is None else f"no {name!r}"
            raise DataError(
                f"{title}: one column must hold the {what}, found {which}. Name it in data.{key}; the columns are "
                f"{described}."
            )
        return found[0]

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    encoded = [name for name, feature in features.items() if _kind(feature) in ("bytes", "binary", "large_binary")]
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    named = [
        name
        for name, feature in features.items()
        if name.lower() in (*LABEL_COLUMNS, "labels") and isinstance(feature, datasets.Value)
    ]
    image = only("images", "image_column", wanted[0], images, encoded)
    if unlabeled and not classes and not named and wanted[1] is None:
        return image, None
    return image, only("labels", "label_column", wanted[1], classes, named)


def _kind(feature: Any) -> str:
    """Return a short name of a column's type; "bytes" for an image whose type the file does not state."""
    if isinstance(feature, Mapping):
        return "bytes" if "bytes" in feature else "struct"
    return str(getattr(feature, "dtype", None) if type(feature).__name__ == "Value" else type(feature).__name__)


def _rows(where: str, dataset: Any, column: str) -> ArrowRows:
    import datasets

    rows = dataset.select_columns([column])
    kind = _kind(rows.features[column])
    if kind == "Image":
        rows = rows.cast_column(column, datasets.Image(decode=False))
    elif kind not in ("bytes", "binary", "large_binary"):
        raise DataError(f"{where}: the column {column!r} holds {kind}, and no encoded images.")
    stamps = [stamp(each["filename"]) for each in rows.cache_files]
    sizes, *times = zip(*stamps, strict=True) if stamps else (NO_STAMP,) * 3
    in_files = bool(stamps) and NO_STAMP not in stamps and not _paths(rows, column)
    return ArrowRows(
        rows, column, where, np.arange(len(rows)), (sum(sizes), *map(max, times)) if in_files else NO_STAMP
    )


def _paths(rows: Any, column: str) -> bool:
    """Return whether some images are files of their own, which change without the data set."""
    from pyarrow import compute

    cells = rows.with_format("arrow")[:].column(column)
    return _kind(rows.features[column]) in ("Image", "bytes") and compute.struct_field(cells, "bytes").null_count > 0


def _labels(
    title: str, where: str, chosen: Any, train: Any, column: str | None
) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Return the class names and the labels of `chosen`, int64 [N], -1 where a cell is empty or -1."""
    import datasets

    if column is None:
        return (), np.full(len(chosen), UNLABELED, dtype=np.int64)
    cells, feature = _cells(chosen, column), chosen.features[column]
    for row, cell in enumerate(cells):
        if isinstance(cell, bool) or not isinstance(cell, int | str | None):
            raise DataError(f"{where}, row {row}: the label must be a whole number or a name, found {cell!r:.60}.")
    if isinstance(feature, datasets.ClassLabel):
        _require_same_names(where, column, feature, train.features.get(column))
        return tuple(map(str, feature.names)), np.array([_or_none(cell) for cell in cells], dtype=np.int64)
    packed, known = (
        pack_names("" if _or_none(cell) == UNLABELED else str(cell) for cell in each)
        for each in (cells, _cells(train, column))
    )
    return classes_of_labels(title, packed, known, lambda row: f"{where}, row {row}", lambda row: f"{title}, row {row}")


def _require_same_names(where: str, column: str, feature: Any, of_train: Any) -> None:
    """Raise DataError unless a column of classes (ClassLabel) has those of the train split, in the same order."""
    names, wanted = feature.names, getattr(of_train, "names", [])
    if names != wanted:
        raise DataError(
            f"{where}: the names of the classes of {column!r} ({first_few(names, 5)}) are not those of the train split "
            f"({first_few(wanted, 5)}): give both the same, in the same order."
        )


def _targets(
    where: str, chosen: Any, train: Any, columns: Sequence[str], task: Task
) -> tuple[tuple[str, ...], Targets]:
    """Return the names of the K labels or numbers, and their values, float32 [N, K].

    Several columns have a number each. One has numbers, or of labels lists of their classes (ClassLabel).
    """
    import datasets

    for name in columns:
        if name not in chosen.features:
            raise DataError(f"{where} has no column {name!r} (data.label_column): found {', '.join(chosen.features)}.")
    cells = [_cells(chosen, name) for name in columns]
    feature = chosen.features[columns[0]]
    inner = getattr(feature, "feature", None)
    if task == MULTILABEL and len(columns) == 1 and isinstance(inner, datasets.ClassLabel):
        _require_same_names(where, columns[0], inner, getattr(train.features.get(columns[0]), "feature", None))
        rows = np.zeros((len(chosen), len(inner.names)), dtype=np.float32)
        for row, some in zip(rows, cells[0], strict=True):
            row[some if some is not None else slice(None)] = 1 if some is not None else np.nan
        return tuple(map(str, inner.names)), rows
    if len(columns) == 1 and isinstance(next((cell for cell in cells[0] if cell is not None), None), list):
        width = max(len(cell) for cell in cells[0] if cell is not None)
        names = numbers(width)
        table = [[np.nan] * width if cell is None else cell for cell in cells[0]]
    else:
        names, table = tuple(columns), [list(row) for row in zip(*cells, strict=True)]
    try:
        values = np.array([[np.nan if cell is None else float(cell) for cell in row] for row in table])
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}: the labels in {', '.join(columns)} must be numbers, lists of as many numbers, or lists of "
            f"ClassLabel ({cause(error)})."
        ) from error
    return names, target_rows(where, task, values, names)


def _column_of_lists(title: str, chosen: Any) -> str:
    """Return the only column of lists, which has the labels."""
    found = [str(name) for name, feature in chosen.features.items() if hasattr(feature, "feature")]
    if len(found) != 1:
        raise DataError(
            f"{title}: name the columns of labels in data.label_column; there are {', '.join(chosen.features)}."
        )
    return found[0]


def _or_none(cell: Any) -> Any:
    return UNLABELED if cell is None else cell


def _cells(dataset: Any, column: str) -> list[Any]:
    cells: list[Any] = dataset.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    return cells
