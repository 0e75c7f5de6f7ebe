"""`webdataset:PATH`: tar files with samples, as WebDataset has them.

PATH is a folder of tar files, one tar file, or a pattern such as imagenet-{train,val}-{0000..0127}.tar.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from kdpipe.stages.data.decode import DecodeSpec
from kdpipe.stages.data.image_source import EncodedImages, Names, Stamp, name_at, stamp
from kdpipe.stages.data.scan_cache import scan_threads
from kdpipe.stages.data.sources.listing import Listing
from kdpipe.stages.data.sources.packed.samples import PackedSamples, list_packed
from kdpipe.stages.data.sources.packed.tar_index import index_tar
from kdpipe.stages.data.sources.split_folders import Role, role_of
from kdpipe.stages.data.splits import Indices, Split
from kdpipe.stages.errors import DataError, first_few


@dataclass(frozen=True, eq=False)
class TarMembers(EncodedImages):
    """N images in tar files.

    Attributes:
        shards: The paths of the tar files.
        numbers: Which of these an image is in, int32 [N].
        offsets: Where its bytes start, int64 [N].
        sizes: How many there are, int64 [N].
        names: Its name in the tar file.
    """

    shards: tuple[str, ...]
    numbers: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    names: Names

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, indices: Indices) -> Self:
        offsets, sizes = self.offsets[indices], self.sizes[indices]
        return type(self)(self.shards, self.numbers[indices], offsets, sizes, self.names[indices])

    def where(self, index: int) -> str:
        return f"{self.shards[self.numbers[index]]}: {name_at(self.names, index)}"

    def stamp(self, index: int) -> Stamp:
        return stamp(self.shards[self.numbers[index]])

    def read(self, index: int) -> bytes:
        with open(self.shards[self.numbers[index]], "rb", buffering=0) as file:  # noqa: PTH123 - Path costs more
            return os.pread(file.fileno(), int(self.sizes[index]), int(self.offsets[index]))


def list_webdataset(path: Path, split: Split, spec: DecodeSpec) -> Listing:
    """List the samples of one split, sorted by the names of their images, to be decoded to `spec`.

    A sample's id is a hash of its image's name in the tar file, or, if a name occurs twice, of the tar file's and its
    own. Shards belong to the split that their names, or those of their folders, stand for.

    Raises:
        DataError: A shard is missing or damaged, a sample has not one image, or splits are unclear.
    """
    title = f"webdataset:{path.name}"
    shards = _shards(path)
    splits = _splits(path, shards)
    unsplit = len(splits) == 1
    test: Role | None = "test" if "test" in splits else "val"
    train = next(iter(splits.values())) if unsplit else splits["train"]
    first = _samples(train)
    chosen = first if unsplit or split == "train" else _samples(splits[test])
    listing = list_packed(title, path if unsplit else path / split, chosen, first, spec)
    notices = tuple(_notices(title, splits)) if split == "train" else ()
    return Listing(**{**vars(listing), "unsplit": unsplit, "notices": notices})


def _samples(shards: Sequence[Path]) -> PackedSamples:
    with scan_threads() as map_threads:
        indexed = list(map_threads(index_tar, shards))
    numbers = np.repeat(np.arange(len(shards), dtype=np.int32), [len(each.names) for each in indexed])
    if not len(numbers):
        raise DataError(f"{shards[0]} holds no samples{' and so do the others' if len(shards) > 1 else ''}.")
    columns = [np.concatenate(each) for each in zip(*(vars(index).values() for index in indexed), strict=True)]
    offsets, sizes, names, labels = columns
    source = TarMembers(tuple(map(str, shards)), numbers, offsets, sizes, names)
    keys = names
    if len(np.unique(names)) < len(names):
        stems = np.array([os.fsencode(f"{shard.name}/") for shard in shards])
        keys = np.char.add(stems[numbers], names)
    return PackedSamples(source, keys, labels)


def _shards(path: Path) -> list[Path]:
    """Return the tar files that PATH means."""
    if "://" in str(path) or ":/" in path.name:
        raise DataError(f"{path} is an address: download the tar files, and name their folder.")
    if path.is_dir():
        found = [*path.glob("*.tar"), *path.glob("*/*.tar")]
    else:
        found = []
        for each in expand_braces(str(path)):
            files = glob.glob(each) if glob.has_magic(each) else [each] if os.path.isfile(each) else []  # noqa: PTH113, PTH207
            if not files:
                raise DataError(
                    f"no file {each}: webdataset:PATH is relative to data.root unless absolute, and is a folder of tar "
                    "files or a pattern such as imagenet-{train,val}-{0000..0127}.tar."
                )
            found += map(Path, files)
    if not found:
        raise DataError(f"{path} has no tar files (*.tar) in it: compressed ones must be unpacked first.")
    return sorted(set(found))


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield the strings that braces stand for.

    >>> list(expand_braces("{train,val}-{08..10}"))
    ['train-08', 'train-09', 'train-10', 'val-08', 'val-09', 'val-10']
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    choices = found[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        first, last = map(int, numbers.groups())
        choices = [f"{number:0{len(numbers[1])}}" for number in range(first, last + 1)]
    for choice in choices:
        yield from expand_braces(pattern[: found.start()] + choice + pattern[found.end() :])


def _splits(path: Path, shards: Sequence[Path]) -> dict[Role | None, list[Path]]:
    """Return the shards by split; all of them under one key if no names tell them apart."""
    splits: dict[Role | None, list[Path]] = {}
    for shard in shards:
        splits.setdefault(_role(shard), []).append(shard)
    if len(splits) == 1:
        return splits
    if None in splits:
        known = next(role for role in splits if role)
        raise DataError(
            f"{path}: {splits[known][0].name} is of the {known} split, and {splits[None][0].name} is of none: name the "
            "split in all names of tar files, or in none."
        )
    if "train" not in splits:
        raise DataError(f"{path} has shards of the splits {', '.join(map(str, splits))}, but none of train.")
    return splits


def _role(shard: Path) -> Role | None:
    """Return the split that a word of the file's name, or the name of its folder, stands for."""
    roles = {role for word in re.split(r"[-_. ]+", shard.stem) if (role := role_of(word))}
    if len(roles) > 1:
        raise DataError(f"{shard}: the name stands for the splits {' and '.join(sorted(roles))}: rename it.")
    return roles.pop() if roles else role_of(shard.parent.name)


def _notices(title: str, splits: dict[Role | None, list[Path]]) -> Iterator[str]:
    roles = first_few([str(role) for role in splits])
    if len(splits) == 1 and None not in splits:
        yield f"{title}: all tar files are of the {roles} split: test images are split off (data.test_share)."
    elif "test" not in splits and len(splits) > 1:
        yield f"{title}: the test split is its val split."
    elif len(splits) > 2:
        yield f"{title}: its val split is not used."
