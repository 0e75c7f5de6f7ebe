"""A student that was trained elsewhere, taken from its file: measured like any other, and then compressed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from stages.errors import ModelError
from stages.fine_tune import Tutor
from stages.job_folder import JobFolder
from stages.models.weights import load_weights, read_weights
from stages.network import Network, finish
from stages.start_file import with_widths
from stages.tensor_file import RECORD
from store import FingerprintMismatch, differences


def load_given(path: Path, fresh: Network, class_names: Sequence[str]) -> Network:
    """The student of the recipe, `fresh` and used up, with the weights in a .safetensors file or a torch state dict.

    A file of kdpipe's own says what it is: it must be this student, pruned or not, for `class_names`. Raises ModelError
    where the file does not fit or is quantized, FingerprintMismatch where it says that it is another network.
    """
    record = _record(path)
    architecture = record.get("architecture", fresh.architecture)
    if not isinstance(architecture, Mapping) or not isinstance(architecture.get("widths", {}), Mapping):
        raise ModelError(f"the record in {path} does not say what the network is: it is damaged.")
    architecture = dict(architecture)
    if "quantized" in architecture:
        raise ModelError(
            f"{path} is quantized already ({architecture['quantized']}): give the float student that it was made from."
        )
    widths = architecture.pop("widths", None)
    wanted = {"architecture": dict(fresh.architecture), "class_names": list(class_names)}
    stored = {"architecture": architecture, "class_names": record.get("class_names", list(class_names))}
    if found := differences(stored, json.loads(json.dumps(wanted))):
        raise FingerprintMismatch(f"the student in {path}", found, "Give the recipe that student, or another file.")
    network = with_widths(fresh, widths)
    load_weights(network.model, path)
    return network


def measure_given(tutor: Tutor, network: Network) -> dict[str, Any]:
    """Measure the given student and leave its ONNX file, once; returns its figures."""
    folder = JobFolder(tutor.root / "given")
    made_from = {"starts_from": network.identity, "test": tutor.setup.test_identity()}
    folder.begin(made_from)
    if (done := folder.result()) is not None:
        return done
    network.model.to(tutor.setup.device)
    return finish(folder, network, [], tutor.setup, with_onnx=tutor.handed_out)


def narrow_types(path: Path) -> dict[str, torch.dtype]:
    """The types of a file's tensors that are narrower than float32, by name: a BF16 student is handed on as one."""
    stored = {name: one for name, one in read_weights(path).items() if isinstance(one, Tensor)}
    return {name: one.dtype for name, one in stored.items() if one.is_floating_point() and one.itemsize < 4}


def _record(path: Path) -> dict[str, Any]:
    """What a file of kdpipe's says of itself; nothing for any other, of which `load_weights` says what is amiss."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get(RECORD, "{}"))
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError):
        return {}
    return found if isinstance(found, dict) else {}
