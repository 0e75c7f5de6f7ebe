"""The folder of a training job.

job.json                the inputs that determine the result; a rerun with others is an error
checkpoint.safetensors  all state, while the job is running
metrics.jsonl           one line an epoch
model.safetensors       the trained network
adapters.safetensors    what trained with a student and is no part of it: the adapters of its losses
model.onnx              the network for onnxruntime
result.json             the results; its presence means that the job is finished
SHA256SUMS              the sha256 of each of these files, checked when the file is read
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdpipe.stages.errors import ANOTHER_RUN, RunError
from kdpipe.stages.evaluation.main_metric import best_value, main_value
from kdpipe.stages.faults import fault_sentence
from kdpipe.store import FingerprintMismatch, differences, make_folders, sweep_partial
from kdpipe.store.errors import KdpipeError
from kdpipe.store.fs import safe_read
from kdpipe.store.fs.atomic_write import PARTIAL_SUFFIX
from kdpipe.store.fs.checksums import SUMS, damages, remove_with_sum, require_intact, write_with_sum
from kdpipe.store.redact import redacted_json

MAX_JSON_BYTES = 2**26
"""The largest JSON file that is read: results for 1,000 classes take less than a hundredth of that."""

MAX_FAULTS = 3

Fraction = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, lt=2**60)]
Count = Annotated[int, Field(ge=0, lt=2**60)]


class _Identity(BaseModel):
    weights_sha256: str


class _Result(BaseModel):
    """The keys of result.json that later steps use; others are not checked."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    num_parameters: Count
    onnx_bytes: Count | None
    onnx_agreement: Fraction | None
    identity: _Identity
    wall_s: Amount
    num_macs: int | None = None
    excluded: dict[str, Any] = {}
    examined: dict[str, Any] = {}


@dataclass(frozen=True)
class JobDir:
    """The folder of a job."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def adapters(self) -> Path:
        return self.path / "adapters.safetensors"

    @property
    def onnx(self) -> Path:
        return self.path / "model.onnx"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def begin(self, fingerprint: Mapping[str, Any]) -> None:
        """Claim the folder for a job whose result is determined by `fingerprint`, a JSON object.

        All files of a finished job are checked against their sums, and what a killed one left is removed.

        Raises:
            FingerprintMismatch: It holds a job with other inputs.
            DamagedFileError: A file is not as it was written.
        """
        make_folders([self.path])
        sweep_partial(self.path)
        inputs = redacted_json(json.loads(json.dumps(fingerprint)))
        stored = read_json_file(self.path / "job.json")
        if stored is None:
            write_json_file(self.path / "job.json", inputs)
        elif found := differences(stored, inputs):
            advice = f"Choose {ANOTHER_RUN}, or delete that folder to restart the job."
            named = [(key.replace("distillation.losses.", "distill.", 1), *pair) for key, *pair in found]
            raise FingerprintMismatch(f"the job in {self.path}", named, advice)
        if self.result() is not None:
            for folder in (self.path, *filter(Path.is_dir, self.path.iterdir())):  # also those of hints, pruning steps
                for damage in damages(folder):
                    raise damage
            remove_with_sum(self.checkpoint)

    def result(self) -> dict[str, Any] | None:
        """Return the results of a finished job, None before; raises RunError if they are invalid."""
        record = read_json_file(self.path / "result.json")
        if record is not None and (faults := _faults(record)):
            raise RunError(
                f"{self.path / 'result.json'} is damaged or of another version of kdpipe ({', '.join(faults)}): delete "
                f"the folder {self.path}, and run again."
            )
        return record

    def finish(self, result: Mapping[str, Any]) -> None:
        """Publish the results and delete the checkpoint."""
        write_json_file(self.path / "result.json", result)
        remove_with_sum(self.checkpoint)

    def write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics.jsonl with exactly `lines`, so that a resumed job repeats none."""
        write_with_sum(self.metrics, "".join(json.dumps(line) + "\n" for line in lines).encode())


def sweep_run(run: Path) -> None:
    """Remove the temporary files of killed writers in a run folder and its subfolders. Only its lock's holder may."""
    for folder in (run, *(path for path in run.iterdir() if path.is_dir() and path.suffix != ".zarr")):
        for path in folder.glob(f".*{PARTIAL_SUFFIX}"):
            if path.is_file() and ".html." not in path.name:  # `kdpipe report` writes pages without the lock
                path.unlink(missing_ok=True)


def note_on_old_jobs(run: Path) -> str | None:
    """Return a sentence on the finished jobs of a run whose files have no sums; None if there are none."""
    old = sorted(path.parent for path in run.glob("**/result.json") if not (path.parent / SUMS).exists())
    if not old:
        return None
    return (
        f"{len(old)} finished jobs in {run}, such as {old[0].relative_to(run)}, have no {SUMS}: an older kdpipe made "
        "them, and damage to their files would not be noticed."
    )


def _faults(record: Mapping[str, Any]) -> list[str]:
    """List what is wrong with a job's results, the first few faults."""
    try:
        _Result.model_validate(record)
        main_value(record), best_value(record)
    except ValidationError as error:
        faults = [
            (str(fault["loc"][0]), fault_sentence(fault)) for fault in error.errors(include_url=False)[:MAX_FAULTS]
        ]
        return [f"{name} = {str(record.get(name))[:40]!r}: {message}" for name, message in faults]
    except (ValueError, AttributeError) as error:
        return [str(error)]
    return []


def read_json_file(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file, None if it does not exist; raises RunError if it is damaged or too large.

    Raises DamagedFileError if it differs from its recorded sum.
    """
    require_intact(path)
    try:
        return safe_read.read_json(path, MAX_JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except KdpipeError as error:
        raise RunError(f"{str(error).removesuffix('.')}: delete it, or use another run folder.") from error


def write_json_file(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, atomically, with its sum; URLs are redacted."""
    write_with_sum(path, (json.dumps(redacted_json(record), indent=1) + "\n").encode())
