"""What compression hands over: one folder a student, with everything that a device or a stranger needs.

model.onnx           the float student for onnxruntime
model.int8.onnx      the quantized one (model.int4.onnx where that was asked for)
model.safetensors    the weights of the last of them; the record in its header says what to build around them
model.pt2            torch.export's program of the float student; model.int8.pt2 that of the quantized one
card.json, README.md what it is, from which teacher and stores, how good, how large, how fast; how to run it
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.compression.onnx_file import export_onnx
from stages.compression.torch_program import export_program
from stages.errors import RunError
from stages.job_folder import JobFolder, read_json, write_json
from stages.model_card import card_text
from stages.network import Network, onnx_metadata, require_agreement
from stages.setup import Setup
from stages.tensor_file import save_tensors
from store import fsync_path, make_folders, write_atomically
from store.durable import PARTIAL_SUFFIX
from store.identity import sha256_of


@dataclass(frozen=True)
class Made:
    """A finished network of the chain: where its figures and its ONNX file are, and the network itself."""

    folder: JobFolder
    network: Network


def artefact_folder(root: Path, seed: int) -> Path:
    return root / f"artefacts-seed{seed}"


def write_artefacts(
    folder: Path,
    chain: Sequence[Made],
    facts: Mapping[str, Any],
    setup: Setup,
    *,
    opset: int | None = None,
    narrow: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Any]:
    """Write the artefacts of a chain: a float network, and behind it the quantized one where there is one; returns the
    card. Every file is written whole or not at all, and the card last: what stood there stays until all is well.

    facts: what else the card says. opset: of the ONNX files; None is the exporter's own. narrow: the types in which
    tensors were given, by name, where the network is handed on untouched.
    Raises ModelError where a network cannot be exported, or its file does not answer as it does; RunError where the
    folder cannot be written.
    """
    made_from = sha256_of(_plain({"facts": facts, "opset": opset, "chain": [made.network.identity for made in chain]}))
    held = read_json(folder / "card.json") or {}
    says_so = held.get("made_from") == made_from and {key: held.get(key) for key in facts} == _plain(facts)
    if says_so and _are_whole(folder, held.get("files")):
        return held
    _require_writable(folder)
    with _aside(folder) as new:
        for made in chain:
            _write_network(new, made, setup, opset)
        last = chain[-1].network
        state = {name: one.to((narrow or {}).get(name, one.dtype)) for name, one in last.model.state_dict().items()}
        save_tensors(new / "model.safetensors", state, artefact_record(last, setup))
        card = {
            **facts,
            "architecture": dict(last.architecture),
            "input": _input(last, setup),
            "class_names": list(setup.test_set.class_names),
            "files": {path.name: _described(path) for path in sorted(new.iterdir())},
            "made_from": made_from,
        }
        write_atomically(new / "README.md", card_text(card).encode())
        write_json(new / "card.json", card)
    return card


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, whose files take their places in it once all are there; the card's last."""
    new = folder.with_name(f".{folder.name}{PARTIAL_SUFFIX}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        named = [path.name for path in new.iterdir()]
        for place in (folder / name for name in named):
            if place.is_dir():
                raise RunError(f"{place} is a folder, where a file is to be: take it away, and compress again.")
        (folder / "card.json").unlink(missing_ok=True)
        for path in sorted(new.iterdir(), key=lambda one: one.name == "card.json"):
            path.replace(folder / path.name)
        for stale in {path.name for path in folder.glob("model*")} - set(named):
            (folder / stale).unlink()
        fsync_path(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def artefact_record(network: Network, setup: Setup) -> dict[str, Any]:
    """What stands in the header of the weights: all that is needed to build the network and to feed it."""
    return {
        "architecture": dict(network.architecture),
        "normalization": network.normalise.to_json(),
        "class_names": list(setup.test_set.class_names),
    }


def file_name(network: Network, suffix: str) -> str:
    """The name of a network's file: model.onnx, model.int8.onnx, ..."""
    scheme = network.architecture.get("quantized")
    return f"model.{scheme}.{suffix}" if scheme else f"model.{suffix}"


def _write_network(folder: Path, made: Made, setup: Setup, opset: int | None) -> None:
    network, example = made.network, torch.zeros(2, *setup.image_shape)
    onnx, metadata = folder / file_name(network, "onnx"), onnx_metadata(network, setup)
    if opset is not None:
        export_onnx(network.model, example, onnx, metadata=metadata, opset=opset)
    elif made.folder.onnx.is_file():
        write_atomically(onnx, made.folder.onnx.read_bytes())
    else:
        raise RunError(f"{made.folder.onnx} is gone: delete the folder {made.folder.path}, and compress again.")
    # Whatever lies there now: it is what is handed over that must answer as the network does.
    require_agreement(onnx, network, setup, whole_test=True)
    export_program(network.model, example, folder / file_name(network, "pt2"), metadata=metadata)


def _described(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _are_whole(folder: Path, files: Any) -> bool:
    """Whether the files that a card names are there as it describes them."""
    if not isinstance(files, dict) or not files:
        return False
    return all((folder / name).is_file() and _described(folder / name) == files[name] for name in files)


def _input(network: Network, setup: Setup) -> dict[str, Any]:
    return {"name": "images", "shape": ["batch", *setup.image_shape], "pixels": "[0, 1]", **network.normalise.to_json()}


def _require_writable(folder: Path) -> None:
    """Raise RunError before any work where the folder cannot be written."""
    try:
        make_folders([folder])
    except OSError as error:
        raise RunError(f"the artefacts' folder {folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise RunError(f"the artefacts' folder {folder} cannot be written to: make it writable, or take another run.")


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain
