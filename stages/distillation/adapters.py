"""The adapters of a student's losses, kept beside it: what trained with the student and is no part of it.

Fine-tuning of the compressed student continues with them: a hint whose adapter starts from random again outweighs all
other losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn, tensor

from kdpipe.stages.errors import RunError
from kdpipe.stages.losses.distillation import Distillation
from kdpipe.stages.models.safetensors_io import load_tensors, save_tensors
from kdpipe.stages.models.weights.state_dict import state_sha256
from kdpipe.stages.training.job_dir import JobDir

SHA256 = "adapters_sha256"
"""The key of their digest in a job's results."""


@dataclass(frozen=True)
class KeptChannels:
    """The output channels, of `width`, that a layer of a pruned student kept."""

    width: int
    channels: Sequence[int]


def save_adapters(folder: JobDir, distillation: nn.Module | None) -> dict[str, str]:
    """Write the adapters to a job's folder, if there are any; return what its results say of them."""
    state = distillation.state_dict() if distillation is not None else {}
    if not state:
        return {}
    save_tensors(folder.adapters, state, {})
    return {SHA256: state_sha256(state)}


def load_adapters(folder: JobDir) -> dict[str, Tensor]:
    """Return the adapters of a finished job, by name; none if it has none, as those of before adapters were kept.

    Raises:
        RunError: They are missing, or not those that the job's results name.
    """
    wanted = (folder.result() or {}).get(SHA256)
    if wanted is None:
        return {}
    state = load_tensors(folder.adapters)[0]
    if (found := state_sha256(state)) != wanted:
        raise RunError(
            f"{folder.adapters} is not what its job wrote: its sha256 is {found[:12]}, and result.json says "
            f"{str(wanted)[:12]}; restore the file, or delete the folder {folder.path} to train again."
        )
    return state


def restore_adapters(
    distillation: Distillation, adapters: Mapping[str, Tensor], kept: Mapping[str, KeptChannels]
) -> list[str]:
    """Load kept adapters into the losses of a student, cut to the channels that it kept.

    Args:
        distillation: The losses of the student.
        adapters: The adapters of the student before it was pruned.
        kept: The kept channels of the layers that lost some.

    Returns:
        The names of the losses whose adapters do not fit, and start from random.
    """
    unfit = []
    for name, loss in distillation.losses.items():
        built, prefix = loss.state_dict(), f"losses.{name}."
        own = {key.removeprefix(prefix): value for key, value in adapters.items() if key.startswith(prefix)}
        layers = distillation.configs[name].student_layers()
        cut = {key: _cut(own[key], built[key], _candidates(key, layers, kept)) for key in built if key in own}
        fitting = {key: value for key, value in cut.items() if value is not None}
        if fitting.keys() == built.keys() == own.keys():
            loss.load_state_dict(fitting)
        else:
            unfit.append(name)
    scores = adapters.get("ensemble.scores")
    if distillation.ensemble.scores is not None and scores is not None:
        distillation.ensemble.load_state_dict({"scores": scores})
    return unfit


def _candidates(key: str, layers: Sequence[str], kept: Mapping[str, KeptChannels]) -> list[KeptChannels]:
    """Return the kept channels that an adapter may read: of the layer with its number, if it is one of a list."""
    numbers = [int(part) for part in key.split(".") if part.isdigit()]
    first = layers[numbers[0] : numbers[0] + 1] if numbers else ()
    return [kept[layer] for layer in (*first, *layers) if layer in kept]


def _cut(saved: Tensor, built: Tensor, candidates: Sequence[KeptChannels]) -> Tensor | None:
    """Return a tensor cut to the shape of `built` along the axes of kept channels; None if it does not fit."""
    if saved.dim() != built.dim():
        return None
    for axis, (before, after) in enumerate(zip(saved.shape, built.shape, strict=True)):
        if before != after:
            found = [one.channels for one in candidates if (one.width, len(one.channels)) == (before, after)]
            if not found:
                return None
            saved = saved.index_select(axis, tensor(found[0]))
    return saved
