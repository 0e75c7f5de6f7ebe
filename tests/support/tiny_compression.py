"""Compression of the student of a tiny run."""

import dataclasses
import shutil

from kdpipe.stages.compress.artifacts.export_student import export_student
from kdpipe.stages.compress.artifacts.write import artifact_folder
from kdpipe.stages.compress.compress import CompressConfig, compress, compressed_root
from kdpipe.stages.compress.fine_tune import build_fine_tuning
from kdpipe.stages.compress.pruning.config import PruneConfig
from kdpipe.stages.compress.quantize_student import QuantizeConfig
from kdpipe.stages.models.safetensors_io import load_tensors
from support.tiny_run import STUDENT, TRAIN, open_tiny_spec, tiny_context

FINE = dataclasses.replace(TRAIN, lr=0.01)


CONFIG = CompressConfig(
    niceness=0,
    baselines=False,
    prune=PruneConfig(ratio=0.5, round_to=1),
    prune_train=FINE,
    quantize=QuantizeConfig(calibration_batches=2),
    quantize_train=dataclasses.replace(TRAIN, lr=0.001),
    latency_batch_sizes=(1, 3),
    latency_rounds=3,
)


def copied(run, folder):
    """Copy the run into another folder; the store stays where it is."""
    for part in ("teacher", "students", "compressed"):
        if (run / part).exists():
            shutil.copytree(run / part, folder / part)
    return folder


def fine_tuning(run, context, config=CONFIG):
    """Return what the fine-tunings of the tiny student share."""
    spec = open_tiny_spec(run / "store.zarr", context)
    return build_fine_tuning(STUDENT, 0, spec, context, compressed_root(context.run_dir, config))


def compressed(copy, run, config=CONFIG, *, monitor=None, only=("prune", "quantize")):
    context = tiny_context(copy, monitor)
    return compress(config, fine_tuning(run, context, config), only=only)


def exported(copy, run, config=CONFIG):
    context = tiny_context(copy)
    export_student(config, fine_tuning(run, context, config), name="tiny")
    return artifact_folder(compressed_root(copy, config), 0)


def with_prune(**changes):
    return dataclasses.replace(CONFIG, prune=dataclasses.replace(CONFIG.prune, **changes))


def weights(copy, kind):
    return load_tensors(copy / "compressed" / f"{kind}-seed0" / "model.safetensors")[0]


def sizes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
