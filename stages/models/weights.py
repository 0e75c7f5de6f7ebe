"""A network's weights: read from a file that need not be trusted, counted, and given a digest."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.cause import cause
from stages.errors import ModelError
from stages.models.misfits import misfits, no_numbers

NESTED_UNDER = ("state_dict", "model", "model_state_dict")

# What other code calls an entry, and what it is called here.
RENAMED = (
    (re.compile(r"^(?:(?:module|_orig_mod)\.)+"), ""),  # DistributedDataParallel, torch.compile
    (re.compile(r"^block(\d)\.layer\.(\d+)\.convShortcut\."), r"layer\1.\2.shortcut."),  # RepDistiller's wide resnets
    (re.compile(r"^block(\d)\.layer\."), r"layer\1."),
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),  # torchvision's published densenets
)


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` in place from a .safetensors file or a torch state dict.

    A torch file may hold the state dict itself or under one of NESTED_UNDER; names may carry the prefixes of
    DistributedDataParallel and torch.compile. Only tensors are read, never pickled objects. Raises ModelError where the
    file is missing, damaged or unsafe, or its entries are not the model's.
    """
    load_entries(model, read_weights(path), str(path))


def read_weights(path: Path) -> Mapping[str, Any]:
    """The entries of such a file, as they are stored. Raises ModelError where it is missing, damaged or unsafe."""
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}.")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def load_entries(model: nn.Module, entries: Mapping[str, Any], source: str) -> None:
    """Fill `model` in place from the state dict `entries`, read from `source`. Raises ModelError if they do not fit, or
    are no weights of a trained network: no answer comes of NaN, infinity, or a variance below zero.
    """
    wanted = model.state_dict()
    stored = {key if key in wanted else _renamed(key): value for key, value in entries.items()}
    for key in wanted:
        if key.endswith("num_batches_tracked"):  # absent before torch 0.4.1; counts steps and decides no output
            stored.setdefault(key, wanted[key])
    if faults := misfits(stored, wanted):
        raise ModelError(
            f"{source} cannot be loaded into the model: {'; '.join(faults)}. "
            "Check the model's name, args and number of classes."
        )
    if fault := no_numbers(stored, model):
        raise ModelError(f"{source}: {fault}; give weights of a trained network.")
    model.load_state_dict(stored)


def weights_sha256(model: nn.Module) -> str:
    """The digest of a network's state dict."""
    return state_sha256(model.state_dict())


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hex sha256 over the sorted entries of a state dict: name, dtype, shape, little-endian bytes of each."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_little_endian_bytes(tensor))
    return digest.hexdigest()


def count_parameters(model: nn.Module) -> int:
    """The number of trainable and frozen parameters; buffers such as running means are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read as safetensors ({cause(error)}).") from error


def _read_torch(path: Path) -> Mapping[str, Any]:
    if _unpacks_to_more(path):
        raise ModelError(f"{path} unpacks to more than it holds, as torch's own files never do: save it again.")
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, to who wrote the file
            content = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ModelError(_unsafe(path, str(error))) from error
    except Exception as error:  # a damaged file makes torch raise nearly anything, KeyError and EOFError among them
        raise ModelError(f"{path} is damaged or no torch state dict: save it again, or as safetensors.") from error
    for key in NESTED_UNDER:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path} holds no state dict: save model.state_dict(), or convert it to safetensors.")
    return {str(key): value for key, value in content.items()}


def _unpacks_to_more(path: Path) -> bool:
    """Whether a file is a zip whose members are compressed, or share bytes: a small one may fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(member.file_size for member in archive.infolist()) > path.stat().st_size
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False  # no zip: an older torch's file, or one of which torch says what is amiss


def _unsafe(path: Path, why: str) -> str:
    forbidden = re.search(r"GLOBAL (\S+)", why)
    what = f"pickled objects ({forbidden[1]})" if forbidden else "a pickle that torch did not write"
    return (
        f"{path} holds {what}; kdpipe loads only tensors: save model.state_dict() alone, or convert it to safetensors."
    )


def _renamed(key: str) -> str:
    for pattern, name in RENAMED:
        key = pattern.sub(name, key)
    return key


def _little_endian_bytes(tensor: Tensor) -> bytes:
    # Through uint8: numpy has no bfloat16.
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if sys.byteorder == "big":
        raw = raw.reshape(-1, tensor.element_size()).flip(1)
    return raw.numpy().tobytes()
