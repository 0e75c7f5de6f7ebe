"""Which GPUs CUDA_VISIBLE_DEVICES names, in CUDA's words for them: numbers, UUIDs, and the beginnings of these.

Source: CUDA programming guide, environment variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stages.machine.gpus import Gpu

VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"


def visible_gpus(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> list[Gpu | None]:
    """What CUDA_VISIBLE_DEVICES leaves, in its order: all of them where it is not set. None stands for one of which it
    is not certain which it is. As for CUDA, the list ends at the first entry that names nothing.
    """
    if VISIBLE not in environ:
        return [gpu if _numbers_are_certain(gpus, environ) else None for gpu in gpus]
    seen: list[Gpu | None] = []
    for entry in environ[VISIBLE].split(","):
        named = _named(entry.strip(), gpus, environ)
        if not named:
            break
        seen.append(named[0] if len(named) == 1 else None)
    return seen


def _named(entry: str, gpus: Sequence[Gpu], environ: Mapping[str, str]) -> Sequence[Gpu | None]:
    """The GPUs that an entry of CUDA_VISIBLE_DEVICES may mean."""
    if not entry.isdecimal():
        begun = [gpu for gpu in gpus if gpu.uuid.startswith(entry)] if entry.startswith(("GPU-", "MIG-")) else []
        # A part can also be named by its GPU and two numbers, MIG-GPU-.../1/0: that is not looked into.
        return begun or ([None] if entry.startswith("MIG-") else [])
    found = [gpu for gpu in gpus if gpu.index == int(entry)]
    return list(gpus) if found and not _numbers_are_certain(gpus, environ) else found


def _numbers_are_certain(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> bool:
    """Whether CUDA counts as nvidia-smi does: by default it puts the fastest first."""
    return environ.get(ORDER) == "PCI_BUS_ID" or len({gpu.name for gpu in gpus}) == 1


def number_in(name: str) -> int | None:
    """The number in a recipe's device such as cuda:1, which counts among the visible GPUs; None where it has none."""
    _, _, number = name.partition(":")
    return int(number) if number else None
