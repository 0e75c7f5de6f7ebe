"""Offline knowledge distillation: cache a teacher's outputs once, train students from the cache.

Example:
    import kdpipe as kd

    train, test = kd.load_dataset("digits")
    teacher = kd.create_model("cnn", train, width=32)
    kd.train_teacher(teacher, train, test=test, epochs=40)
    store = kd.cache_teacher(teacher, train, "runs/store.zarr", views=kd.Views(8, ["RandomCrop"]), features=["stage2"])
    losses = [kd.losses.KD(temperature=4), kd.losses.Hint([("stage2", "stage2")], weight=5)]
    result = kd.train_student("cnn", train, store, test=test, losses=losses)
    small = kd.compress(result, train, store, prune=0.5, int8=True)
    small.export("student.onnx")

Names are imported on first use (PEP 562), so that `import kdpipe` costs no torch. Below this face, `kdpipe.store` holds
target stores, `kdpipe.stages` what the stages compute, and `kdpipe.pipeline` the command line.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Read when torch is loaded: waiting threads sleep instead of spinning, which on a busy machine costs most of the time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from kdpipe import losses
    from kdpipe.cohorts import CohortResult, train_cohort
    from kdpipe.compression import compress, prune, quantize
    from kdpipe.datasets import as_image_set, load_dataset
    from kdpipe.models import create_model, load_student
    from kdpipe.plugins import (
        register_callback,
        register_dataset,
        register_loss,
        register_model,
        register_optimizer,
        register_schedule,
    )
    from kdpipe.reports import evaluate, evaluate_embeddings, report, verify
    from kdpipe.results import CompressedResult, StudentResult, TeacherResult
    from kdpipe.stages.data.image_set import ImageSet
    from kdpipe.stages.distillation.loader import DistillationLoader
    from kdpipe.stages.models.hooks import extract_features
    from kdpipe.stages.runtime.callbacks import Callback, CallbackState
    from kdpipe.stages.targets.open import open_store_anywhere as open_store
    from kdpipe.stages.views.config import Views
    from kdpipe.store import FingerprintMismatch, KdpipeError, TargetStore
    from kdpipe.students import train_student
    from kdpipe.teachers import cache_teacher, train_teacher

_MODULES = {
    "cohorts": "CohortResult train_cohort",
    "compression": "compress prune quantize",
    "datasets": "as_image_set load_dataset",
    "models": "create_model load_student",
    "plugins": "register_callback register_dataset register_loss register_model register_optimizer register_schedule",
    "reports": "evaluate evaluate_embeddings report verify",
    "results": "CompressedResult StudentResult TeacherResult",
    "stages.data.image_set": "ImageSet",
    "stages.distillation.loader": "DistillationLoader",
    "stages.models.hooks": "extract_features",
    "stages.runtime.callbacks": "Callback CallbackState",
    "stages.targets.open": "open_store:open_store_anywhere",
    "stages.views.config": "Views",
    "store": "FingerprintMismatch KdpipeError TargetStore",
    "students": "train_student",
    "teachers": "cache_teacher train_teacher",
}
_SOURCES = {
    name: (module, attribute or name)
    for module, names in _MODULES.items()
    for name, _, attribute in (entry.partition(":") for entry in names.split())
}

# fmt: off
__all__ = [  # literal, so that linters and type checkers see it; a test compares it with _MODULES
    "Callback", "CallbackState", "CohortResult", "CompressedResult", "DistillationLoader", "FingerprintMismatch",
    "ImageSet", "KdpipeError", "StudentResult", "TargetStore", "TeacherResult", "Views", "__version__", "as_image_set",
    "cache_teacher", "compress", "create_model", "evaluate", "evaluate_embeddings", "extract_features", "load_dataset",
    "load_student", "losses", "open_store", "prune", "quantize", "register_callback", "register_dataset",
    "register_loss", "register_model", "register_optimizer", "register_schedule", "report", "train_cohort",
    "train_student", "train_teacher", "verify",
]
# fmt: on

if not TYPE_CHECKING:  # mypy uses the imports above and reports unknown names

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            value = _version()
        elif name == "losses":
            return import_module("kdpipe.losses")
        elif name in _SOURCES:
            module, attribute = _SOURCES[name]
            value = getattr(import_module(f"{__name__}.{module}"), attribute)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kdpipe")
    except PackageNotFoundError:  # a checkout that is on PYTHONPATH without being installed
        return "0.0.0"


__version__: str
