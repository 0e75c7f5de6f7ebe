"""Tensors and a JSON record in one safetensors file: how checkpoints and weights are kept. It cannot carry code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from stages.cause import cause
from stages.errors import ModelError
from store import canonical_json, write_atomically
from store.fs.safe_read import open_regular_file

RECORD = "kdpipe"
"""The key in the safetensors header under which the JSON record stands."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and record, whole or not at all. Equal contents give equal bytes."""
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, safetensors.torch.save(own, metadata={RECORD: canonical_json(record)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote. Raises ModelError where the file is absent, damaged, or another kind of file."""
    try:
        os.close(open_regular_file(path))  # a pipe would wait for ever
        with safetensors.safe_open(path, "pt") as file:
            record = _table(json.loads((file.metadata() or {})[RECORD]))
            return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118 - it is no dict
    except FileNotFoundError:
        raise ModelError(f"there is no file {path}.") from None
    except (OSError, ValueError, KeyError, RecursionError, safetensors.SafetensorError) as error:
        why = (isinstance(error, OSError) and error.strerror) or cause(error)
        raise ModelError(f"{path} is not a file that kdpipe wrote, or it is damaged ({why}); delete it.") from error


def _table(record: Any) -> dict[str, Any]:
    """The record, if it is a table; else ValueError."""
    if not isinstance(record, dict):
        raise ValueError("its record is no table")  # noqa: TRY004 - of what a file holds, not of a caller's mistake
    return record
