"""Weights of a network: loading them from untrusted files, counting and hashing them."""

from __future__ import annotations

import hashlib
import json
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
from torch import Tensor, nn

from kdpipe.stages.errors import ModelError, cause
from kdpipe.store.fs.checksums import require_intact

NESTED_UNDER = ("state_dict", "model", "model_state_dict")

MAX_NAMED = 3

MAX_NAME_LENGTH = 80
"""Letters of a name in an untrusted file that are shown."""

STATISTICS = ("running_mean", "running_var")

# Names of entries in other code, and the names here.
RENAMED = (
    (re.compile(r"^(?:(?:module|_orig_mod)\.)+"), ""),  # DistributedDataParallel, torch.compile
    (re.compile(r"^block(\d)\.layer\.(\d+)\.convShortcut\."), r"layer\1.\2.shortcut."),  # RepDistiller's wide resnets
    (re.compile(r"^block(\d)\.layer\."), r"layer\1."),
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),  # torchvision's published densenets
)


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` in place from a .safetensors file or a torch state dict.

    A torch file may hold the state dict itself or under one of NESTED_UNDER; names may carry the prefixes of
    DistributedDataParallel and torch.compile. Only tensors are read, never pickled objects. Raises ModelError if the
    file is missing, damaged or unsafe, or its entries do not fit the model.
    """
    load_entries(model, read_weights(path), str(path))


def read_weights(path: Path) -> Mapping[str, Any]:
    """Return the entries of a weights file; raises ModelError if it is missing, damaged or unsafe."""
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}.")
    require_intact(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def load_entries(model: nn.Module, entries: Mapping[str, Any], source: str) -> None:
    """Fill `model` in place from the state dict `entries`, read from `source`.

    Raises ModelError if they do not fit, or hold NaN, infinity, or a variance below zero; nothing is loaded then.
    """
    expected = model.state_dict()
    stored = {key if key in expected else _renamed(key): value for key, value in entries.items()}
    for key in expected:
        if key.endswith("num_batches_tracked"):  # absent before torch 0.4.1; counts steps and decides no output
            stored.setdefault(key, expected[key])
    if faults := _misfits(stored, expected):
        raise ModelError(
            f"{source} cannot be loaded into the model: {'; '.join(faults)}. "
            "Check the model's name, args and number of classes."
        )
    if fault := _invalid_values(stored, model):
        raise ModelError(f"{source}: {fault}; give weights of a trained network.")
    model.load_state_dict(stored)


def weights_sha256(model: nn.Module) -> str:
    """Return the digest of a network's state dict."""
    return state_sha256(model.state_dict())


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the hex sha256 over the sorted entries of a state dict: name, dtype, shape, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy has no bfloat16
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable and frozen parameters, without buffers such as running means."""
    return sum(parameter.numel() for parameter in model.parameters())


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read as safetensors ({cause(error)}).") from error


def _read_torch(path: Path) -> Mapping[str, Any]:
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
    for key in NESTED_UNDER:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path} holds no state dict: save model.state_dict(), or convert it to safetensors.")
    return {str(key): value for key, value in content.items()}


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


def _renamed(key: str) -> str:
    for pattern, name in RENAMED:
        key = pattern.sub(name, key)
    return key


def _misfits(stored: Mapping[str, Any], expected: Mapping[str, Tensor]) -> list[str]:
    """List missing and unexpected entries and wrong shapes or types, the first few of each; empty where all fit."""
    here = {key: stored[key] for key in expected if key in stored}
    reshaped = [
        f"{key} is stored as {_shape(value)}, wanted {list(expected[key].shape)}"
        for key, value in here.items()
        if _shape(value) != list(expected[key].shape)
    ]
    retyped = [
        f"{key} is stored as {kind}" for key, value in here.items() if (kind := _wrong_type(value, expected[key]))
    ]
    return [
        *_first_few("missing ", [key for key in expected if key not in stored]),
        *_first_few("unexpected ", [key[:MAX_NAME_LENGTH] for key in stored if key not in expected]),
        *_first_few("", reshaped or retyped),
    ]


def _invalid_values(stored: Mapping[str, Tensor], model: nn.Module) -> str | None:
    """Describe the first parameter or batch-norm statistic that is invalid; None where there is none.

    Other buffers may hold infinity: masks do.
    """
    checked = dict(model.named_parameters())
    checked |= {key: value for key, value in model.state_dict().items() if key.endswith(STATISTICS)}
    for name, own in checked.items():
        tensor = stored[name].to(own.dtype)
        if not bool(tensor.isfinite().all()):
            return f"{name} holds NaN or infinity"
        if name.endswith("running_var") and bool((tensor < 0).any()):
            return f"{name} holds a variance below zero"
    return None


def _shape(value: Any) -> list[int] | str:
    return list(value.shape) if isinstance(value, Tensor) else "no tensor"


def _wrong_type(value: Any, expected: Tensor) -> str | None:
    """Describe why a tensor cannot be converted to the type of `expected` without loss; None where it can."""
    if not isinstance(value, Tensor):
        return None  # reported as a wrong shape
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        kind = "meta" if value.is_meta else "quantized" if value.is_quantized else "sparse"
        return f"a {kind} tensor, wanted numbers"
    if value.is_complex() or (expected.is_floating_point() and not value.is_floating_point()):
        return f"{value.dtype}, wanted {expected.dtype}".replace("torch.", "")
    return None


def _first_few(kind: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = f" and {len(entries) - MAX_NAMED} more" if len(entries) > MAX_NAMED else ""
    return [f"{kind}{', '.join(entries[:MAX_NAMED])}{more}"]
