"""Untrusted weights files: the state dicts in them, by the key under which each stands."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kdpipe.stages.errors import ModelError, cause

Entries = Mapping[str, Any]
"""A state dict as it is in a file: tensors by name, and whatever else stands among them."""

MAX_DEPTH = 2
"""Keys above that of a state dict: `model.student`, `checkpoint.ema.model`."""


def read_weights(path: Path) -> dict[str, Entries]:
    """Return the state dicts in a .safetensors or torch file, by their dotted key; "" for one that is the whole file.

    Only tensors are read, never pickled objects. Raises ModelError if the file is missing, damaged or unsafe, or holds
    none.
    """
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}.")
    return {"": _read_safetensors(path)} if path.suffix == ".safetensors" else _read_torch(path)


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read as safetensors ({cause(error)}).") from error


def _read_torch(path: Path) -> dict[str, Entries]:
    if _is_torchscript(path):
        raise ModelError(
            f"{path} is a TorchScript file: a program, not weights alone. If you trust it, load it with torch.jit.load "
            "and save its state_dict()."
        )
    if _is_zip_bomb(path):
        raise ModelError(
            f"{path} is compressed or has overlapping members, unlike torch's own files: save it again with torch.save."
        )
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ModelError(_unsafe(path, str(error))) from error
    except Exception as error:  # a damaged file makes torch raise nearly anything, KeyError and EOFError among them
        raise ModelError(f"{path} is damaged or no torch state dict: save it again, or as safetensors.") from error
    if not (found := _state_dicts(content)):
        raise ModelError(f"{path} holds no state dict: save model.state_dict(), or convert it to safetensors.")
    return found


def _state_dicts(content: Any) -> dict[str, Entries]:
    """Return the mappings from names to tensors in a file's content, by their dotted key; "" for the content itself."""
    found: dict[str, Entries] = {}
    seen = set[int]()  # a hostile file may have one mapping a million times
    level = [("", content)]
    for _ in range(MAX_DEPTH + 1):
        inner = []
        for key, value in level:
            if not isinstance(value, Mapping) or id(value) in seen:
                continue
            seen.add(id(value))
            named = {name: each for name, each in value.items() if isinstance(name, str)}
            if any(isinstance(each, Tensor) for each in named.values()):
                found[key] = named
            inner += [(f"{key}.{name}" if key else name, each) for name, each in named.items()]
        level = inner
    return found


def _is_torchscript(path: Path) -> bool:
    """Return whether a zip file has code: torch.jit.load would run it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(re.match(r"[^/]+/code/", name) for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False


def _is_zip_bomb(path: Path) -> bool:
    """Return whether a zip file has compressed or overlapping members: a small one could fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(member.file_size for member in archive.infolist()) > path.stat().st_size
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False  # not a zip: an older torch's file, or torch will report the damage


def _unsafe(path: Path, why: str) -> str:
    forbidden = re.search(r"GLOBAL (\S+)", why)
    what = f"pickled objects ({forbidden[1]})" if forbidden else "a pickle that torch did not write"
    return (
        f"{path} holds {what}; kdpipe loads only tensors: save model.state_dict() alone, or convert it to safetensors."
    )
