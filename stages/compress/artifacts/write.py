"""Write the artifacts of a seed's student: a folder for each network made from it, with everything needed to run it.

KIND/model.onnx            for onnxruntime, in float or integers
KIND/model.safetensors     the weights; the header records what to build
KIND/model.pt2             torch.export's program
KIND/model_fp16.onnx       FP16 for GPUs, of float networks with compress.float16
KIND/model.xml, model.bin  OpenVINO's IR, if compress.target names OpenVINO
KIND/model.pte             ExecuTorch's program, if it names ExecuTorch
KIND/predict.py            classifies image files with model.onnx
KIND/card.json, README.md  what it is, its teacher and stores, accuracy, size, latency; how to run it
card.json, README.md       all networks, ranked, and which one is recommended
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdpipe.stages.compress.artifacts.model_card import card_text, ranking_text
from kdpipe.stages.compress.artifacts.ranking import ranked, reason
from kdpipe.stages.data.tasks import CLASSIFICATION
from kdpipe.stages.errors import RunError
from kdpipe.stages.evaluation.evaluate import Evaluation
from kdpipe.stages.export.exportable import OnnxFile
from kdpipe.stages.export.onnx_export import export_onnx
from kdpipe.stages.export.torch_export import export_program
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.models.safetensors_io import save_tensors
from kdpipe.stages.training.finalize import onnx_metadata, require_agreement
from kdpipe.stages.training.job_dir import JobDir, read_json_file, write_json_file
from kdpipe.store import fsync_path, make_folders, write_atomically
from kdpipe.store.format.identity import sha256_of
from kdpipe.store.fs.atomic_write import PARTIAL_SUFFIX
from kdpipe.store.fs.checksums import SUMS, damages, file_sha256, record_sums, require_intact, write_with_sum


@dataclass(frozen=True)
class Candidate:
    """A finished network that is offered.

    Attributes:
        kind: Its name: student, pruned, int8, int8-unpruned, ...
        folder: The folder of its figures and ONNX file.
        network: The network.
        dtypes: The original dtypes of its tensors, by name, where its file keeps others than the network has.
        files: Further files of the network, for other runtimes.
        runtime: The library that its predict.py uses.
        is_ranked: Whether it is compared with the others; not if it is for another target than the first.
    """

    kind: str
    folder: JobDir
    network: ModelBundle
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    files: Sequence[Path] = ()
    runtime: str = "onnxruntime"
    is_ranked: bool = True


def artifact_folder(root: Path, seed: int) -> Path:
    """Return the folder of a seed's artifacts."""
    return root / f"artifacts-seed{seed}"


def write_artifacts(
    folder: Path,
    candidates: Sequence[Candidate],
    facts: Mapping[str, Any],
    test: Evaluation,
    *,
    opset: int | None = None,
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write the artifacts of each candidate, after `before_each`, then the ranking, and return the latter's card.

    Every file is written atomically, each card after the files it describes: earlier artifacts of a network stay until
    its new ones are complete. `facts` are entries of every card.

    Raises:
        ModelError: If a network cannot be exported, or its file disagrees with it.
        RunError: If the folder cannot be written.
    """
    try:
        make_folders([folder / candidate.kind for candidate in candidates])
    except OSError as error:
        raise RunError(f"the artifacts folder {folder} cannot be created: {error.strerror}.") from error
    for candidate in candidates:
        before_each()
        _write_candidate(folder / candidate.kind, candidate, facts, test, opset)
    kinds = {candidate.kind for candidate in candidates}
    for stale in [path.parent for path in folder.glob("*/card.json") if path.parent.name not in kinds]:
        shutil.rmtree(stale)
    networks = {one.kind: facts["networks"][one.kind] for one in candidates if one.is_ranked}
    others = [one.kind for one in candidates if not one.is_ranked]
    card = _as_json({**facts, "ranking": [*ranked(networks), *others], "reason": reason(networks)})
    if _intact_card(folder) != card:
        write_with_sum(folder / "README.md", ranking_text(card).encode())
        write_json_file(folder / "card.json", card)
    return card


def _write_candidate(
    folder: Path, candidate: Candidate, facts: Mapping[str, Any], test: Evaluation, opset: int | None
) -> None:
    """Write the files of one network, unless they are there and whole."""
    network = candidate.network
    runtime = {} if candidate.runtime == "onnxruntime" else {"runtime": candidate.runtime}
    made_from = sha256_of(_as_json({"facts": facts, "opset": opset, "network": network.identity, **runtime}))
    previous = _intact_card(folder)
    if previous.get("made_from") == made_from and {key: previous.get(key) for key in facts} == _as_json(facts):
        return
    with _staged(folder) as new:
        _write_network(new, candidate, test, opset)
        state = {
            name: tensor.to(candidate.dtypes.get(name, tensor.dtype))
            for name, tensor in network.model.state_dict().items()
        }
        record = {
            "architecture": dict(network.architecture),
            "normalization": network.normalize.to_json(),
            "class_names": list(test.class_names),
        }
        save_tensors(new / "model.safetensors", state, record)
        predict = Path(__file__).with_name("predict.py").read_text()
        write_atomically(new / "predict.py", predict.replace('"onnxruntime"', f'"{candidate.runtime}"', 1).encode())
        card = {
            **facts,
            "network": candidate.kind,
            **runtime,
            "architecture": dict(network.architecture),
            "input": {
                "name": "images",
                "shape": ["batch", *test.image_shape],
                "pixels": "[0, 1]",
                "resize": "centered square, Pillow's bilinear",
                "test_crop": test.crop,
                **network.normalize.to_json(),
            },
            "class_names": list(test.class_names),
            **({} if test.task == CLASSIFICATION else {"task": test.task}),
            "files": {path.name: _describe(path) for path in sorted(new.iterdir()) if path.name != SUMS},
            "made_from": made_from,
        }
        write_atomically(new / "README.md", card_text(card).encode())
        write_json_file(new / "card.json", card)


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files replace those in `folder` once all are written, the card last."""
    new = folder.with_name(f".{folder.name}{PARTIAL_SUFFIX}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        record_sums(new)
        (folder / "card.json").unlink(missing_ok=True)
        for stale in [path for path in folder.iterdir() if path.is_file() and not (new / path.name).exists()]:
            stale.unlink()
        for path in sorted(new.iterdir(), key=lambda path: path.name == "card.json"):
            path.replace(folder / path.name)
        fsync_path(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_network(folder: Path, candidate: Candidate, test: Evaluation, opset: int | None) -> None:
    network, example = candidate.network, torch.zeros(2, *test.image_shape)
    onnx, metadata = folder / "model.onnx", onnx_metadata(network, test)
    if opset is not None:
        export_onnx(network.model, example, onnx, metadata=metadata, opset=opset)
    elif candidate.folder.onnx.is_file():
        require_intact(candidate.folder.onnx)
        write_atomically(onnx, candidate.folder.onnx.read_bytes())
    else:
        raise RunError(
            f"{candidate.folder.onnx} is missing: delete the folder {candidate.folder.path}, and compress again."
        )
    # The exported copy itself must agree with the network.
    require_agreement(onnx, network, test, whole_test=True)
    if not isinstance(network.model, OnnxFile):
        export_program(network.model, example, folder / "model.pt2", metadata=metadata)
    for file in candidate.files:
        require_intact(file)
        write_atomically(folder / file.name, file.read_bytes())


def _intact_card(folder: Path) -> dict[str, Any]:
    """Return the card of a folder whose files are all as they were written; empty for any other."""
    is_intact = (folder / SUMS).exists() and next(damages(folder), None) is None
    return (read_json_file(folder / "card.json") or {}) if is_intact else {}


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _as_json(record: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain
