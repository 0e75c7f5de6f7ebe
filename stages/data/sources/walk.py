"""Walk folders of images, and count what is left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

_FORMATS = "apng avif bmp dib gif j2k jfif jp2 jpe jpeg jpg jpx pbm pgm png pnm ppm tif tiff webp"
SUFFIXES = frozenset(f".{name}" for name in _FORMATS.split())
"""Suffixes of images, in lower case: torchvision's, and the others of the formats that are decoded."""

_OF_SYSTEMS = ("thumbs.db", "desktop.ini")
_NUM_REASONS = 5


@dataclass
class LeftOut:
    """What a walk passed over: by reason, the number and the first path below `folder`."""

    folder: str
    found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, path: str) -> None:
        number, example = self.found.get(reason, (0, path))
        self.found[reason] = (number + 1, min(example, path))

    def __str__(self) -> str:
        """Return one sentence; empty if nothing was left out."""
        if not self.found:
            return ""
        parts = [
            f"{number:,} {reason} ({os.path.relpath(example, self.folder)})"
            for reason, (number, example) in sorted(self.found.items(), key=lambda each: (-each[1][0], each[0]))
        ]
        more = f" and {len(parts) - _NUM_REASONS} other kinds" if len(parts) > _NUM_REASONS else ""
        return f"{self.folder}: left out are {', '.join(parts[:_NUM_REASONS])}{more}."


@dataclass(frozen=True)
class FoundFolder:
    """The folders and image files directly in a folder."""

    path: str
    folders: list[str]
    images: list[str]


def walk_images(folder: str, left_out: LeftOut) -> Iterator[FoundFolder]:
    """Walk a folder and all below it, through links; what is hidden, or no image by its suffix, is left out.

    A link to a folder that it lies in is left out, too: it would have no end.
    """
    real = Path(os.path.realpath(folder))
    above = {folder: {real, *real.parents}}
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        ends_at = above.pop(parent)
        kept = []
        for name in folders:
            path = Path(parent, name)
            target = path.resolve()
            if name.startswith("."):
                left_out.add("hidden folders", str(path))
            elif path.is_symlink() and target in ends_at:
                left_out.add("links to a folder above", str(path))
            else:
                kept.append(name)
                above[str(path)] = ends_at | {target}
        folders[:] = kept
        yield FoundFolder(parent, kept, [name for name in names if _is_image(parent, name, left_out)])


def _is_image(parent: str, name: str, left_out: LeftOut) -> bool:
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - a million Path objects would cost seconds
    if suffix in SUFFIXES and not name.startswith("."):
        return True
    if suffix in SUFFIXES and not name.startswith("._"):  # macOS writes ._NAME beside NAME
        left_out.add("hidden images", f"{parent}/{name}")
    elif not name.startswith(".") and name.lower() not in _OF_SYSTEMS:
        left_out.add(f"{suffix} files" if suffix else "files without a suffix", f"{parent}/{name}")
    return False


def _raise(error: OSError) -> NoReturn:
    raise error
