"""`table:PATH`: the paths and labels of images in a CSV, TSV or Parquet file.

PATH is one file, to be split unless its column `split` says how; or a folder with a file for each split, such as
train.csv and test.csv (or val.csv, if there is no test.csv).
"""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import Any

import numpy as np
import numpy.typing as npt

from kdpipe.stages.data.decode import DecodeSpec
from kdpipe.stages.data.image_files import ImageFileList
from kdpipe.stages.data.image_set import UNLABELED
from kdpipe.stages.data.image_source import FilePaths
from kdpipe.stages.data.sources.image_folder import sample_id
from kdpipe.stages.data.sources.label_names import LABEL_COLUMNS, class_names_of, labels_of_lists
from kdpipe.stages.data.sources.listing import Listing, has_target, other_tasks, target_rows
from kdpipe.stages.data.sources.split_folders import Role, role_of
from kdpipe.stages.data.splits import Split
from kdpipe.stages.data.tasks import CLASSIFICATION, Task
from kdpipe.stages.errors import DataError, cause, first_few

SUFFIXES = (".csv", ".tsv", ".parquet")

PATH_COLUMNS = ("path", "filepath", "file_path", "file_name", "filename", "file", "image_path", "img_path", "image")
SPLIT_COLUMN = "split"


@dataclass(frozen=True, slots=True)
class _Row:
    """A sample: its path and label as they stand in a row of the table, of which there may be millions."""

    path: str
    label: int | str | tuple[float, ...]
    role: Role | None
    place: str
    number: int

    @property
    def where(self) -> str:
        return f"{self.place} {self.number}"


def list_table(
    path: Path,
    split: Split,
    spec: DecodeSpec,
    columns: Columns = (None, None),
    task: Task = CLASSIFICATION,
    *,
    separator: str | None = None,
) -> Listing:
    """List the images of one split, sorted by path, to be decoded to `spec`.

    Paths are relative to the table's folder. A sample's id is a hash of its path; the train split defines the classes:
    labels that are all whole numbers are 0, 1, ... C - 1, others are names, sorted. An empty cell: unlabeled.
    `columns` are the names of those of paths and labels; None where they have a usual name. With another task than
    classification the cells of all columns of labels are numbers, and empty ones not known; with a `separator` one
    column has the names of each image's labels.

    Raises:
        DataError: A file, column or cell is missing, ambiguous or invalid; an image is listed twice; or a test class is
            not in train.
    """
    read_as: Task = task if separator is None else CLASSIFICATION  # one cell of text
    title, folder, splits = (
        f"table:{path.name}",
        path if path.is_dir() else path.parent,
        _splits(path, columns, read_as),
    )
    unsplit = set(splits) == {None}
    train = splits[None] if unsplit else splits["train"]
    chosen = train if unsplit or split == "train" else splits.get("test") or splits["val"]
    keyed = _by_key(chosen, folder)
    if task == CLASSIFICATION:
        class_names, labels, targets = *_classes(title, keyed.values(), train), None
    elif separator is not None:
        class_names, targets = _lists(title, list(keyed.values()), train, separator)
        labels = has_target(targets)
    else:
        given = columns[1] if isinstance(columns[1], tuple) else (columns[1] or "label",)
        class_names = tuple(str(name) for name in given)
        targets = target_rows(title, task, np.array([row.label for row in keyed.values()]), class_names)
        labels = has_target(targets)
    sample_ids = np.fromiter(map(sample_id, keyed), dtype=np.int64, count=len(keyed))
    files = [os.path.join(folder, os.path.expanduser(row.path)) for row in keyed.values()]  # noqa: PTH111, PTH118
    if not os.path.exists(files[0]):  # noqa: PTH110 - the scan finds the others
        raise DataError(
            f"{next(iter(keyed.values())).where}: there is no file {files[0]}: paths are relative to {folder}, the "
            "table's folder."
        )
    return Listing(
        name=title,
        labels=labels,
        sample_ids=sample_ids,
        class_names=class_names,
        images=ImageFileList(title, folder if unsplit else folder / split, FilePaths.pack(files), sample_ids, spec),
        unsplit=unsplit,
        notices=_notices(title, splits) if split == "train" and not unsplit else (),
        targets=targets,
    )


def _splits(path: Path, columns: Columns, task: Task) -> dict[Role | None, list[_Row]]:
    """Return the rows by split; all of them by None if nothing says how to split them."""
    if path.is_dir():
        files = _split_files(path)
        splits: dict[Role | None, list[_Row]] = {role: list(_rows(file, columns, task)) for role, file in files.items()}
    elif path.suffix.lower() in SUFFIXES and path.is_file():
        splits = {}
        for row in _rows(path, columns, task):
            splits.setdefault(row.role, []).append(row)
    else:
        raise DataError(
            f"no table {path.absolute()}: table:PATH is relative to data.root unless absolute, and is a file "
            f"({', '.join(SUFFIXES)}), or a folder with train.csv and test.csv."
        )
    if not splits or not all(splits.values()):
        raise DataError(f"{path.absolute()} lists no images.")
    if None not in splits:
        _require_apart(path, splits)
    return splits


def _split_files(folder: Path) -> dict[Role, Path]:
    found: dict[Role, Path] = {}
    for file in sorted(folder.iterdir()):
        role = role_of(file.stem) if file.suffix.lower() in SUFFIXES else None
        if role and role in found:
            raise DataError(f"{found[role]} and {file} are both the {role} split: remove or rename one.")
        if role:
            found[role] = file
    if "train" not in found or not {"test", "val"} & set(found):
        names = first_few([file.name for file in found.values()]) if found else "none"
        raise DataError(
            f"{folder.absolute()} needs a table of the train and one of the test split, such as train.csv and "
            f"test.csv; found: {names}. One table for both is table:PATH of the file itself."
        )
    return found


def _require_apart(path: Path, splits: dict[Role | None, list[_Row]]) -> None:
    if "train" not in splits or not {"test", "val"} & set(splits):
        found = ", ".join(sorted(str(role) for role in splits))
        raise DataError(
            f"{path.absolute()}: the column {SPLIT_COLUMN!r} must name a train and a test (or val) split, found only "
            f"{found}: without the column the table is split by data.test_share."
        )
    trained = {row.path: row for row in splits["train"]}
    for row in splits.get("test") or splits["val"]:
        if row.path in trained:
            raise DataError(f"{row.where}: {row.path} is an image of the train split, too ({trained[row.path].where}).")


def _notices(title: str, splits: dict[Role | None, list[_Row]]) -> tuple[str, ...]:
    if "test" not in splits:
        return (f"{title}: the test split is its val split.",)
    return (f"{title}: its val split is not used.",) if "val" in splits else ()


def _rows(file: Path, columns: Columns, task: Task) -> Iterator[_Row]:
    """Read a table's rows.

    Raises:
        DataError: It cannot be read, or a column or cell is missing, ambiguous or invalid.
    """
    is_text = file.suffix.lower() != ".parquet"
    place = f"{file}, {'line' if is_text else 'row'}"
    for number, path, cells, split in (_read_text if is_text else _read_parquet)(file, columns):
        where = f"{place} {number}"
        if not isinstance(path, str) or not path.strip():
            raise DataError(f"{where}: the image's path must be text, found {str(path)[:40]!r}.")
        if "://" in path:
            raise DataError(f"{where}: {path} is an address, and a table lists files: download the images first.")
        label = _one_label(cells, where) if task == CLASSIFICATION else tuple(_number(cell, where) for cell in cells)
        role = role_of(split) if isinstance(split, str) else None
        if split is not None and role is None:
            raise DataError(f"{where}: the split must be train, val or test, found {split!r}.")
        yield _Row(path.strip(), label, role, place, number)


def _one_label(cells: Sequence[Any], where: str) -> int | str:
    (label,) = cells
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        raise DataError(f"{where}: the label must be a whole number or a name, found {label!r}.{other_tasks()}")
    return label if isinstance(label, int) else intern(label or "")


def _number(cell: Any, where: str) -> float:
    try:
        return float("nan" if cell is None or cell == "" else cell)
    except (TypeError, ValueError):
        raise DataError(f"{where}: the label must be a number, or empty, found {cell!r:.40}.") from None


Columns = tuple[str | None, str | tuple[str, ...] | None]
"""The columns of images and labels that a recipe names."""

Cells = tuple[int, Any, Sequence[Any], Any]
"""The number of a row, and its path, labels and split; None where there is no such column."""


def _read_text(file: Path, wanted: Columns) -> Iterator[Cells]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            first = opened.readline()
            delimiter = next((mark for mark in "\t;," if mark in first), ",")
            opened.seek(0)
            reader = csv.reader(opened, delimiter=delimiter, strict=True)
            header = next(reader, [])
            path, labels, split = _columns(file, header, wanted)
            path_at, labels_at = header.index(path), [header.index(name) for name in labels]
            split_at = header.index(split) if split else None
            for cells in filter(None, reader):
                if len(cells) != len(header):
                    raise DataError(
                        f"{file}, line {reader.line_num}: {len(cells)} cells, and the header has {len(header)}."
                    )
                found = [cells[column].strip() for column in labels_at]
                yield (
                    reader.line_num,
                    cells[path_at].strip(),
                    found,
                    None if split_at is None else cells[split_at].strip(),
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as a table in UTF-8 ({cause(error)}).") from error


def _read_parquet(file: Path, wanted: Columns) -> Iterator[Cells]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{file}: Parquet files need pyarrow: pip install 'kdpipe[parquet]'.") from error
    try:
        opened = parquet.ParquetFile(file)
        path, labels, split = _columns(file, opened.schema_arrow.names, wanted)
        number = 0
        for batch in opened.iter_batches(columns=[path, *labels, *([split] if split else [])]):
            cells = [batch.column(name).to_pylist() for name in (path, *labels)]
            splits = batch.column(split).to_pylist() if split else [None] * len(batch)
            for one_split, one_path, *some in zip(splits, *cells, strict=True):
                number += 1
                yield number, one_path, some, one_split
    except DataError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise DataError(f"{file} cannot be read as Parquet ({cause(error)}).") from error


def _columns(file: Path, header: Sequence[str], wanted: Columns) -> tuple[str, tuple[str, ...], str | None]:
    """Return the names of the columns of paths, labels and splits."""

    def only(what: str, key: str, name: str | None, usual: Sequence[str]) -> str:
        known = usual if name is None else (name.strip().lower(),)
        found = [name for name in header if name.strip().lower() in known]
        if len(found) != 1:
            number = "none" if not found else f"several ({', '.join(found)}): keep one"
            raise DataError(
                f"{file}: one column must hold the {what}, named {first_few(known)}, or else named in data.{key}; "
                f"found {number}. The columns are {first_few(list(header)) or 'missing'}."
            )
        return found[0]

    split = next((name for name in header if name.strip().lower() == SPLIT_COLUMN), None)
    paths, labels = wanted
    names = labels if isinstance(labels, tuple) else (labels,)
    return (
        only("paths", "image_column", paths, PATH_COLUMNS),
        tuple(only("labels", "label_column", name, LABEL_COLUMNS) for name in names),
        split,
    )


def _by_key(rows: Sequence[_Row], folder: Path) -> dict[str, _Row]:
    """Return the rows by path below `folder`, sorted, in one Unicode form."""
    keyed: dict[str, _Row] = {}
    for row in rows:
        key = os.path.normpath(row.path).removeprefix(f"{folder}{os.sep}").replace(os.sep, "/")
        twin = keyed.setdefault(unicodedata.normalize("NFC", key), row)
        if twin is not row:
            raise DataError(f"{row.where}: {row.path} is listed before ({twin.where}): keep one of the rows.")
    return dict(sorted(keyed.items()))


def _classes(
    title: str, rows: Collection[_Row], train: Sequence[_Row]
) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Return the class names, and the label of each row, int64 [N]."""
    class_names = _class_names(title, train)
    label_of = {name: label for label, name in enumerate(class_names)}
    label_of[""] = UNLABELED
    if unknown := [row for row in rows if str(row.label) not in label_of]:
        raise DataError(
            f"{unknown[0].where}: the class {unknown[0].label!r} is missing from the train split: its classes are "
            f"{first_few(class_names)}."
        )
    return class_names, np.array([label_of[str(row.label)] for row in rows], dtype=np.int64)


def _lists(
    title: str, rows: Sequence[_Row], train: Sequence[_Row], separator: str
) -> tuple[tuple[str, ...], npt.NDArray[np.float32]]:
    """Return the names of the labels in cells of several, and 0 or 1 of each, float32 [N, K]."""

    def where(text: str) -> str:
        return next(row.where for row in (*train, *rows) if str(row.label) == text)

    chosen, known = ([str(row.label) for row in some] for some in (rows, train))
    return labels_of_lists(title, chosen, known, separator, where)


def _class_names(title: str, rows: Sequence[_Row]) -> tuple[str, ...]:
    def where(label: str) -> str:
        return next(row.where for row in rows if str(row.label) == label)

    labels = dict.fromkeys(text for row in rows if (text := str(row.label)))
    return class_names_of(title, labels, where) if labels else ()
