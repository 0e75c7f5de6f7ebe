"""Checkpoints and weights as safetensors files with a JSON record, which cannot carry code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from kdpipe.stages.errors import ModelError, cause
from kdpipe.store import canonical_json
from kdpipe.store.fs.checksums import require_intact, write_with_sum
from kdpipe.store.fs.safe_read import open_regular_file

RECORD = "kdpipe"
"""The key of the JSON record in the safetensors metadata."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and record atomically, with their sum; equal contents give equal bytes."""
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    write_with_sum(path, safetensors.torch.save(own, metadata={RECORD: canonical_json(record)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `save_tensors`; raises ModelError if it is absent, damaged, or another kind of file.

    Raises DamagedFileError if it differs from its recorded sum.
    """
    require_intact(path)
    try:
        os.close(open_regular_file(path))  # raises for a pipe, which would block
        with safetensors.safe_open(path, "pt") as file:
            record = _require_object(json.loads((file.metadata() or {})[RECORD]))
            return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise ModelError(f"there is no file {path}.") from None
    except (OSError, ValueError, KeyError, RecursionError, safetensors.SafetensorError) as error:
        why = (isinstance(error, OSError) and error.strerror) or cause(error)
        raise ModelError(
            f"{path} is not a file that kdpipe wrote, or it is damaged ({why}); delete it if it is one of kdpipe's."
        ) from error


def _require_object(record: Any) -> dict[str, Any]:
    """Return the record if it is an object; else raise ValueError."""
    if not isinstance(record, dict):
        raise ValueError("its record is not a JSON object")  # noqa: TRY004 - invalid data, not an invalid argument
    return record
