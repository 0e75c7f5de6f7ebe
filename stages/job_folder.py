"""One training job's folder: what it was made from, where it stands, what came out.

job.json                what decides its result: a rerun with other inputs is refused, pair by pair
checkpoint.safetensors  all state, while the job is under way
metrics.jsonl           one line an epoch
model.safetensors       the trained network
model.onnx              the same for onnxruntime
result.json             the figures; its presence means done
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import RunError
from store import FingerprintMismatch, differences, make_folders, sweep_partial, write_atomically
from store.fs.safe_read import read_regular_file

MOST_JSON_BYTES = 2**26
"""Of a record: the figures of a network of 1,000 classes take less than a hundredth of that."""

FIGURES: dict[str, tuple[type, ...]] = {
    "accuracy": (int, float),
    "best_accuracy": (int, float),
    "num_parameters": (int,),
    "onnx_bytes": (int, type(None)),
    "onnx_agreement": (int, float, type(None)),
    "identity": (dict,),
    "wall_s": (int, float),
}
"""What a finished job says of itself, at the least."""

MORE_FIGURES: dict[str, tuple[type, ...]] = {"num_macs": (int, type(None)), "excluded": (dict,), "examined": (dict,)}
"""What some also say."""

SHARES = ("accuracy", "best_accuracy", "onnx_agreement")
AMOUNTS = ("num_parameters", "onnx_bytes", "wall_s")
MOST_AMOUNT = 2**60


@dataclass(frozen=True)
class JobFolder:
    """A folder that a job owns."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def onnx(self) -> Path:
        return self.path / "model.onnx"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def begin(self, made_from: Mapping[str, Any]) -> None:
        """Claim the folder for a job that is decided by `made_from`, a JSON object.

        Raises FingerprintMismatch if it holds a job that was made from something else.
        """
        make_folders([self.path])
        sweep_partial(self.path)
        wanted = json.loads(json.dumps(made_from))
        stored = read_json(self.path / "job.json")
        if stored is None:
            write_json(self.path / "job.json", wanted)
            return
        found = differences(stored, wanted)
        if found:
            advice = "Give this recipe another run folder (--run), or delete that folder to start it afresh."
            raise FingerprintMismatch(f"the job in {self.path}", found, advice)

    def result(self) -> dict[str, Any] | None:
        """The figures of a finished job; None while it is not. Raises RunError where they are not a job's figures."""
        record = read_json(self.path / "result.json")
        if record is not None and (faults := _faults(record)):
            raise RunError(
                f"{self.path / 'result.json'} is damaged or another kdpipe's ({', '.join(faults)}): delete the folder "
                f"{self.path}, and run again."
            )
        return record

    def finish(self, result: Mapping[str, Any]) -> None:
        """Publish the figures. The checkpoint has done its duty and goes."""
        write_json(self.path / "result.json", result)
        self.checkpoint.unlink(missing_ok=True)

    def write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Make metrics.jsonl hold exactly `lines`: a resumed job leaves no line twice."""
        write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _faults(record: Mapping[str, Any]) -> list[str]:
    """What is amiss with a job's figures."""
    lacking = [f"it lacks {name}" for name in FIGURES if name not in record]
    kinds = {**FIGURES, **MORE_FIGURES}
    wrong = [name for name in record if name in kinds and not isinstance(record[name], kinds[name])]
    if not lacking and not wrong:  # each of its kind: now what they say
        wrong = [name for name in SHARES if record[name] is not None and not 0 <= record[name] <= 1]
        wrong += [name for name in AMOUNTS if record[name] is not None and not 0 <= record[name] < MOST_AMOUNT]
        wrong += [] if isinstance(record["identity"].get("weights_sha256"), str) else ["identity"]
    return lacking + [f"{name} = {str(record[name])[:40]!r}" for name in wrong]


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a plain file; None where there is nothing. Raises RunError where it is damaged, or too large
    to be of ours.
    """
    try:
        raw = read_regular_file(path, MOST_JSON_BYTES)
        record = json.loads(raw) if len(raw) <= MOST_JSON_BYTES else "too large"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise RunError(f"{path} cannot be read ({why}): delete it, or use another run folder.") from error
    if not isinstance(record, dict):
        raise RunError(f"{path} cannot be read (no JSON object): delete it, or use another run folder.")
    return record


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object, indented for people, whole or not at all."""
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
