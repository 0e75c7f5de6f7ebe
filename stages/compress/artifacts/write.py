"""Write the artifacts of a compressed student: one folder with everything needed to run it.

model.onnx           the float student for onnxruntime
model.int8.onnx      the quantized one (model.int4.onnx for INT4)
model.safetensors    the weights of the last of them; its header records what to build
model.pt2            torch.export's program of the float student; model.int8.pt2 that of the quantized one
card.json, README.md what it is, its teacher and stores, accuracy, size, latency; how to run it
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdpipe.stages.compress.artifacts.model_card import card_text
from kdpipe.stages.errors import RunError
from kdpipe.stages.evaluation.evaluate import Evaluation
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.torch_export import export_program
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.safetensors_io import save_tensors
from kdpipe.stages.training.finalize import onnx_metadata, require_agreement
from kdpipe.stages.training.job_dir import JobDir, read_json_file, write_json_file
from kdpipe.store import fsync_path, make_folders, write_atomically
from kdpipe.store.format.identity import sha256_of
from kdpipe.store.fs.atomic_write import PARTIAL_SUFFIX
from kdpipe.store.fs.checksums import SUMS, damages, record_sums, require_intact


@dataclass(frozen=True)
class ArtifactStage:
    """A finished network of the chain, and the folder of its figures and ONNX file."""

    folder: JobDir
    network: ModelBundle


def artifact_folder(root: Path, seed: int) -> Path:
    """Return the folder of a seed's artifacts."""
    return root / f"artifacts-seed{seed}"


def write_artifacts(
    folder: Path,
    chain: Sequence[ArtifactStage],
    facts: Mapping[str, Any],
    test: Evaluation,
    *,
    opset: int | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Any]:
    """Write the artifacts of a chain, a float network and optionally the quantized one, and return the card.

    Every file is written atomically, the card last: earlier artifacts stay until all new ones are complete. `facts` are
    further entries of the card, `dtypes` the original dtypes of tensors, by name, for a network exported unchanged.

    Raises:
        ModelError: If a network cannot be exported, or its file disagrees with it.
        RunError: If the folder cannot be written.
    """
    identities = [stage.network.identity for stage in chain]
    made_from = sha256_of(_as_json({"facts": facts, "opset": opset, "chain": identities}))
    is_intact = (folder / SUMS).exists() and next(damages(folder), None) is None
    previous = (read_json_file(folder / "card.json") or {}) if is_intact else {}
    if previous.get("made_from") == made_from and {key: previous.get(key) for key in facts} == _as_json(facts):
        return previous
    try:
        make_folders([folder])
    except OSError as error:
        raise RunError(f"the artifacts folder {folder} cannot be created: {error.strerror}.") from error
    with _staged(folder) as new:
        for stage in chain:
            _write_network(new, stage, test, opset)
        last = chain[-1].network
        state = {
            name: tensor.to((dtypes or {}).get(name, tensor.dtype)) for name, tensor in last.model.state_dict().items()
        }
        record = {
            "architecture": dict(last.architecture),
            "normalization": last.normalize.to_json(),
            "class_names": list(test.class_names),
        }
        save_tensors(new / "model.safetensors", state, record)
        card = {
            **facts,
            "architecture": dict(last.architecture),
            "input": {
                "name": "images",
                "shape": ["batch", *test.image_shape],
                "pixels": "[0, 1]",
                **last.normalize.to_json(),
            },
            "class_names": list(test.class_names),
            "files": {path.name: _describe(path) for path in sorted(new.iterdir()) if path.name != SUMS},
            "made_from": made_from,
        }
        write_atomically(new / "README.md", card_text(card).encode())
        write_json_file(new / "card.json", card)
    return card


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files replace those in `folder` once all are written, the card last."""
    new = folder.with_name(f".{folder.name}{PARTIAL_SUFFIX}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        record_sums(new)
        names = [path.name for path in new.iterdir()]
        (folder / "card.json").unlink(missing_ok=True)
        for path in sorted(new.iterdir(), key=lambda path: path.name == "card.json"):
            path.replace(folder / path.name)
        for stale in {path.name for path in folder.glob("model*")} - set(names):
            (folder / stale).unlink()
        fsync_path(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_network(folder: Path, stage: ArtifactStage, test: Evaluation, opset: int | None) -> None:
    network, example = stage.network, torch.zeros(2, *test.image_shape)
    name = f"model.{scheme}" if (scheme := network.architecture.get("quantized")) else "model"
    onnx, metadata = folder / f"{name}.onnx", onnx_metadata(network, test)
    if opset is not None:
        export_onnx(network.model, example, onnx, metadata=metadata, opset=opset)
    elif stage.folder.onnx.is_file():
        require_intact(stage.folder.onnx)
        write_atomically(onnx, stage.folder.onnx.read_bytes())
    else:
        raise RunError(f"{stage.folder.onnx} is missing: delete the folder {stage.folder.path}, and compress again.")
    # The exported copy itself must agree with the network.
    require_agreement(onnx, network, test, whole_test=True)
    export_program(network.model, example, folder / f"{name}.pt2", metadata=metadata)


def _describe(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _as_json(record: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain
