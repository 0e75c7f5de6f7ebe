"""How the teacher of a store is computed: what its manifest records, and what this machine can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from kdpipe.stages.compute.compiled import require_compiler
from kdpipe.stages.compute.settings import EXACT, ComputeSettings, fast_precisions
from kdpipe.stages.errors import ModelError, RunError
from kdpipe.stages.models.bundle import ModelBundle
from kdpipe.stages.runtime.events import RunMonitor
from kdpipe.store import Manifest, StoreError
from kdpipe.store.format.identity import PLAIN

COMPILE = "cache.compile"
"""The key, for messages."""

DEFAULT_BATCH_SIZE = 256
"""Images per batch where no trial chose another number."""


def settings_of(manifest: Manifest) -> ComputeSettings:
    """Return how the teacher of a store is computed. Raises StoreError for what this kdpipe does not know."""
    compute = {**PLAIN, **manifest.identity.compute}
    try:
        return ComputeSettings.from_json(compute)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"the store's teacher was computed with {str(compute)[:200]}, which this kdpipe does not know: use the "
            "kdpipe that wrote it, or cache again."
        ) from error


def batch_size_of(manifest: Manifest, wanted: int | Literal["auto"]) -> int:
    """Return the images per batch: those of the recipe, of the store's trial, or the default."""
    if wanted != "auto":
        return wanted
    found = manifest.trial.get("batch_size")
    return found if type(found) is int and found > 0 else DEFAULT_BATCH_SIZE


def with_settings(manifest: Manifest, settings: ComputeSettings, trial: Mapping[str, Any]) -> Manifest:
    """Return the manifest of a new store whose teacher is computed with `settings`, and what its trial found."""
    compute = {} if settings == EXACT else settings.to_json()
    return replace(manifest, identity=replace(manifest.identity, compute=compute), trial=trial)


def require_available(precision: str, device: torch.device) -> None:
    """Raise ModelError where a recipe's precision is not computed by the device's hardware."""
    if not is_available(precision, device):
        raise ModelError(
            f"cache.precision = {precision!r}: this {device.type} computes {_hardware(device)} in hardware: set one of "
            "these, or 'auto'."
        )


def is_available(precision: str, device: torch.device) -> bool:
    """Return whether a device computes a precision in hardware; "auto" is one that it does."""
    return precision in ("auto", "float32", *fast_precisions(device))


def teacher_of_store(
    teacher: ModelBundle, path: Path, manifest: Manifest, device: torch.device, warn: Callable[[str], None]
) -> ModelBundle:
    """Return the teacher, to be computed as the units that the store at `path` has already.

    `warn` receives a sentence where those were computed by another kind of device. Raises RunError where this one lacks
    their precision.
    """
    settings, begun_on = settings_of(manifest), manifest.trial.get("device", device.type)
    if not is_available(settings.precision, device):
        raise RunError(
            f"{path} was begun in {settings.precision}, and this {device.type} computes {_hardware(device)} in "
            f"hardware: complete it on a machine like that on which it was begun ({begun_on}), or cache into another "
            "store (--run or cache.store)."
        )
    if begun_on != device.type:
        warn(
            f"{path} was begun on {begun_on} and continues on {device.type}: units that are computed here differ in "
            "their last bits from those computed there."
        )
    return replace(teacher, compute=settings)


def compile_key_of(teacher: ModelBundle, device: torch.device, monitor: RunMonitor) -> str | None:
    """Return the recipe key that asks for torch.compile, which says so; None if the teacher is not compiled.

    Raises:
        RecipeError: There is no compiler.
    """
    if not teacher.compute.compile:
        return None
    require_compiler(device, COMPILE)
    monitor.warn_once(
        "cache-teacher", f"{COMPILE} = true: the first batch of each size is compiled, which may take a minute."
    )
    return COMPILE


def _hardware(device: torch.device) -> str:
    return " and ".join(["float32", *fast_precisions(device)])
